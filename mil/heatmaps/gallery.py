"""Draws the tiles that count most and, for contrast, those that count least: each as a picture of
its own, and all on one sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mil.heatmaps.scores import TileScores, compute_percentile_ranks
from patch_encoder.slides.base import Slide
from patch_encoder.tiles.grid import read_tile
from patch_encoder.viz.captions import INK, QUIET, TEXT, TITLE, fit_text, load_caption_font
from wsi_common.files import atomic_path

CELL, GAP, CAPTION = 168, 10, 36  # px of a sheet's tile, between tiles, of the text below
COLUMNS = 6  # of a sheet
STRIP, SHOWN = 56, 4  # px and number of the tiles in the cohort's table


@dataclass(frozen=True)
class TopTile:
    """A chosen tile: kind `top` or `low`, rank within it (1 first), row in the bag, level-0 corner,
    value, percentile.
    """

    kind: str
    rank: int
    tile: int
    x: int
    y: int
    value: float
    percentile: float

    @property
    def file(self) -> str:
        """Name of its picture."""
        return f"{self.kind}_{self.rank:02d}_x{self.x}_y{self.y}.jpg"

    def record(self) -> dict[str, object]:
        """As plain values, with the file name."""
        return asdict(self) | {"file": self.file}


def choose_tiles(scores: TileScores, top: int, low: int) -> list[TopTile]:
    """Choose the `top` highest values, highest first, then the `low` lowest, lowest first; no tile
    is in both.
    """
    order = np.argsort(-scores.values, kind="stable")  # equal ones in the order of the bag
    ranks = compute_percentile_ranks(scores.values)
    first = order[:top]
    last = order[len(first) :][::-1][:low]
    corners, values = scores.coordinates.coords.tolist(), scores.values.tolist()
    return [
        TopTile(kind, rank, row, *corners[row], values[row], float(ranks[row]))
        for kind, rows in (("top", first), ("low", last))
        for rank, row in enumerate(rows.tolist(), start=1)
    ]


def format_value(value: float, shown: str) -> str:
    """Write attention as a share of the slide's, a probability or a risk as it is."""
    forms = {"attention": f"{100 * value:.3g} %", "probability": f"{value:.3f}"}
    return forms.get(shown, f"{value:.3g}")


def write_gallery(
    folder: Path, slide: Slide, scores: TileScores, tiles: Sequence[TopTile], title: str
) -> None:
    """Write `tiles/` (one picture each), gallery.jpg and, for the cohort's table, strip.jpg."""
    pictures = [read_tile(slide, scores.coordinates.geometry, tile.x, tile.y) for tile in tiles]
    for tile, pixels in zip(tiles, pictures, strict=True):
        save_jpeg(folder / "tiles" / tile.file, Image.fromarray(pixels), 90)
    save_jpeg(folder / "gallery.jpg", make_sheet(pictures, tiles, scores.shown, title), 88)
    strip = Image.new("RGB", (SHOWN * (STRIP + 2) - 2, STRIP), "white")
    count = min(SHOWN, sum(tile.kind == "top" for tile in tiles))
    for index, pixels in enumerate(pictures[:count]):
        small = Image.fromarray(pixels).resize((STRIP, STRIP), Image.Resampling.BOX)
        strip.paste(small, (index * (STRIP + 2), 0))
    save_jpeg(folder / "strip.jpg", strip, 80)


def make_sheet(
    pictures: Sequence[np.ndarray], tiles: Sequence[TopTile], shown: str, title: str
) -> Image.Image:
    """Draw all tiles on white, highest first, each with rank, value and corner."""
    font, small = load_caption_font(TITLE), load_caption_font(TEXT)
    pairs = list(zip(tiles, pictures, strict=True))
    members = {kind: [pair for pair in pairs if pair[0].kind == kind] for kind in ("top", "low")}
    groups = {kind: found for kind, found in members.items() if found}
    rows = sum(-(-len(found) // COLUMNS) for found in groups.values())
    width = COLUMNS * (CELL + GAP) + GAP
    page = Image.new("RGB", (width, 34 + 26 * len(groups) + rows * (CELL + CAPTION + GAP)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 8), fit_text(title, font, width - 2.0 * GAP), fill=INK, font=font)
    y = 34
    for kind, found in groups.items():
        heading = f"{'highest' if kind == 'top' else 'lowest'} {shown}"
        draw.text((GAP, y + 4), heading, fill=QUIET, font=small)
        y += 26
        for place, (tile, pixels) in enumerate(found):
            x = GAP + place % COLUMNS * (CELL + GAP)
            picture = Image.fromarray(pixels)
            page.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
            text = f"{tile.rank}   {format_value(tile.value, shown)}"
            draw.text((x, y + CELL + 2), text, fill=INK, font=small)
            draw.text((x, y + CELL + 17), f"x {tile.x}  y {tile.y}", fill=QUIET, font=small)
            if place % COLUMNS == COLUMNS - 1 or place == len(found) - 1:
                y += CELL + CAPTION + GAP
    return page


def save_jpeg(path: Path, image: Image.Image, quality: int) -> None:
    """Write the picture atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, "JPEG", quality=quality)
