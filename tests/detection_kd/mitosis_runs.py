"""A rendered set of mitoses that a network learns in seconds, and the arguments of its trainings."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from detection_kd.evaluation.hard_samples import Filtering
from detection_kd.evaluation.kept_tiles import describe_tiles, write_kept
from detection_kd.train_mitosis import Config, main, read_tiles
from tests.helpers import write_pyramid
from wsi_common.config import load_config

SIDE, MPP = 96, 0.5
SPLIT = ("train",) * 6 + ("val",) * 2 + ("test",) * 2
TINY = (
    "network.trunk=small",
    "network.init=random",
    "network.norm=layer",
    "tile_size=32",
    "epochs=4",
    "batch_size=16",
    "lr=0.004",
    "device=cpu",
    "precision=fp32",
    "workers=0",
    "log_every=4",
)


def draw_field(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Pink noise with a dark blue dot at every point, uint8 (SIDE, SIDE, 3)."""
    pixels = 200 + rng.normal(0, 12, (SIDE, SIDE, 3)) + np.array([20, -20, 10])
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    for x, y in points:
        near = np.hypot(columns - x, rows - y) < 4
        pixels[near] = np.array([70, 40, 110]) + rng.normal(0, 8, (int(near.sum()), 3))
    return pixels.clip(0, 255).astype(np.uint8)


def write_mitosis_set(folder: Path, wrong: int = 0, mpp: float | None = MPP) -> list[str]:
    """Fields in MIDOG's layout, two per case; the arguments that name them.

    Args:
        folder: where.
        wrong: points per training field where there is nothing.
        mpp: of the images; None: they do not say.
    """
    rng, errors = np.random.default_rng(0), np.random.default_rng(1)
    images, boxes, rows = [], [], []
    for number in range(2 * len(SPLIT)):
        case, name = number // 2, f"{number + 1:03d}.tiff"
        points = rng.uniform(8, SIDE - 8, (1 + number % 2, 2))
        write_pyramid(folder / "images" / name, draw_field(rng, points), mpp, levels=(1,))
        false = errors.uniform(8, SIDE - 8, (wrong if SPLIT[case] == "train" else 0, 2))
        entry = {"id": number + 1, "file_name": name, "width": SIDE, "height": SIDE}
        images.append(entry)
        for x, y in (*points, *false):
            box = {"bbox": [x - 25, y - 25, x + 25, y + 25], "category_id": 1}
            boxes.append({"id": len(boxes) + 1, "image_id": number + 1, **box})
        scanner = ("A", "B")[case % 2]
        rows.append([name, f"case{case}", scanner, mpp or "", SPLIT[case]])
    names = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}]
    document = {"images": images, "annotations": boxes, "categories": names}
    annotations, table = folder / "MIDOG.json", folder / "cases.csv"
    annotations.write_text(json.dumps(document))
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["file", "case", "scanner", "mpp", "split"], *rows])
    return [
        f"data.annotations={annotations}",
        f"data.images={folder}/images",
        f"data.cases={table}",
    ]


def train(inputs: list[str], output: Path, *settings: str) -> Path:
    """A finished training in this process."""
    given = [*inputs, *TINY, *settings, f"output={output}"]
    assert main(load_config(Config, given)) == 0
    return output


def configure(inputs: list[str], *settings: str) -> Config:
    """The configuration of a training that is not started."""
    return load_config(Config, [*inputs, *TINY, "output=unused", *settings])


def write_kept_table(folder: Path, config: Config, **changes: np.ndarray) -> Path:
    """A kept.csv of all training tiles, with some arrays of the filter replaced."""
    tiles = read_tiles(config, None)[0]
    count = len(tiles)
    plain = {"keep": np.ones(count, bool), "weights": np.ones(count), "labels": tiles.labels}
    filtering = Filtering(**{**plain, **changes}, reasons=[""] * count)
    provenance = {"data": describe_tiles(tiles), "teachers": {}}
    write_kept(folder, tiles, np.full(count, 0.5), filtering, provenance)
    return folder / "kept.csv"


def write_some_kept(inputs: list[str], folder: Path) -> Path:
    """A table that drops every fifth tile, relabels every eleventh and weighs all by their place,
    for tiles that overlap by a quarter.
    """
    config = configure(inputs, "overlap=0.25")
    labels = read_tiles(config, None)[0].labels
    numbers = np.arange(len(labels))
    changes = {"keep": numbers % 5 > 0, "weights": np.linspace(0.5, 1, len(labels))}
    changes["labels"] = np.where(numbers % 11 == 3, 1 - labels, labels)
    return write_kept_table(folder, config, **changes)
