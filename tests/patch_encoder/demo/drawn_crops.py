"""Crops of mitotic figures in the form of AMi-Br, whose colours say what each part is."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from patch_encoder.demo.histology.figure_crops import TABLE

FIGURE, DARK = 10, 60
"""Red levels of the middle of a crop, and of one corner in ten."""


def write_crops(folder: Path) -> Path:
    """12 slides of 8 crops; red says what a tile is, green its slide, blue its crop."""
    rows = []
    (folder / "patches" / "normal").mkdir(parents=True)
    for slide in range(12):
        for crop in range(8):
            uid = slide * 8 + crop
            picture = np.full((128, 128, 3), (200, 20 + slide * 10, 20 + crop * 10), np.uint8)
            picture[43:85, 43:85, 0] = FIGURE
            if crop == 0:
                picture[:42, :42, 0] = DARK
            if crop == 7:
                picture[:, -9:] = 0  # the slide ends here
            Image.fromarray(picture).save(folder / "patches" / "normal" / f"MIDOG21_{uid}.png")
            rows.append((f"{slide * 12 + 1:03d}.tiff", "MIDOG21", uid, 500 * crop, 500))
    # another figure 60 px to the left of, and above, that of crop 1 of slide 0
    rows.append(("001.tiff", "MIDOG21", 0, 440, 440))
    with (folder / TABLE).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("slide", "dataset", "uid", "x", "y"))
        writer.writerows(rows)
    return folder
