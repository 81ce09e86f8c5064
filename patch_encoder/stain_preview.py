"""Look at what stain normalisation and augmentation make of a slide's tiles, or of picture files,
before thousands are encoded.

    python -m patch_encoder.stain_preview slides=cohort/slides/S001.svs output=preview.png
    python -m patch_encoder.stain_preview slides=pictures output=preview.png rows=6
        stain_target=target.png

One picture: a row a tile, columns original, Reinhard and Macenko (statistics of the slide, as
extraction takes them by default), haematoxylin alone, eosin alone, and three draws of augmentation.
Of a folder every slide or picture gives an equal share of rows; those that cannot be read are left
out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from patch_encoder.cohort.slide_files import find_slides
from patch_encoder.extraction.keys import StainKeys
from patch_encoder.slides import RegionError, Slide, SlideError, open_slide
from patch_encoder.stain.augment import HedJitter, StainJitter
from patch_encoder.stain.macenko import StainProfile, has_one_stain
from patch_encoder.stain.normaliser import (
    Normaliser,
    build_normaliser,
    convert_to_tensor,
    thin_pixels,
)
from patch_encoder.stain.optical_density import select_stained_pixels
from patch_encoder.viz.captions import INK, QUIET, TEXT, TITLE, load_caption_font
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import atomic_path

logger = logging.getLogger(__name__)
COLUMNS = (
    "original",
    "Reinhard",
    "Macenko",
    "haematoxylin",
    "eosin",
    "HED jitter",
    "HED jitter",
    "stain jitter",
)
GAP, HEAD, LABEL = 4, 24, 18
CANDIDATES = 64  # places of a slide that are looked at
GRID = 64  # pixels a side that count in its statistics


@dataclass
class Config(StainKeys):
    """Keys of the preview."""

    slides: str = key(REQUIRED, "slide file, or folder tree of slides", path=True)
    output: str = key(REQUIRED, "where the results are written; a PNG file", runtime=True)
    rows: int = key(5, "rows in all")
    tile_size: int = key(256, "side of a tile, px; at level 0")
    alpha: float = key(
        0.1, "augmentation: stains are multiplied by 1 +- alpha (stain jitter: three times alpha)"
    )
    beta: float = key(0.05, "augmentation: and shifted by +- beta, optical density")
    seed: int = key(0, "seed of everything that is drawn at random")


class PreviewRow(NamedTuple):
    """A tile, and the pixels that stand for its slide."""

    name: str
    tile: UInt8[Tensor, "3 h w"]
    slide: UInt8[Tensor, "3 1 n"]


def read_rows(slide: Slide, count: int, size: int) -> list[PreviewRow]:
    """The `count` places with most tissue of a grid of CANDIDATES, in reading order."""
    side = min(size, slide.width, slide.height)
    across = max(1, round((CANDIDATES * slide.width / slide.height) ** 0.5))
    down = max(1, round(CANDIDATES / across))
    found: list[tuple[int, int, Tensor]] = []
    for y in np.unique(np.linspace(0, slide.height - side, down).astype(int)):
        for x in np.unique(np.linspace(0, slide.width - side, across).astype(int)):
            try:
                found.append((int(x), int(y), convert_to_tensor(slide.read(int(x), int(y), side))))
            except RegionError as error:
                logger.warning("stain_preview: %s", error)
    if not found:
        return []
    pixels = torch.cat([thin_pixels(tile, GRID).flatten(1) for *_, tile in found], 1).unsqueeze(1)
    tissue = [float(select_stained_pixels(tile)[0].float().mean()) for *_, tile in found]
    chosen: list[int] = []
    for index in sorted(range(len(found)), key=lambda i: -tissue[i]):
        apart = all(
            max(abs(found[index][k] - found[other][k]) for k in (0, 1)) >= side for other in chosen
        )
        if apart and len(chosen) < count:
            chosen.append(index)
    return [
        PreviewRow(f"{slide.slide_id}  ({found[i][0]}, {found[i][1]})", found[i][2], pixels)
        for i in sorted(chosen)
    ]


def make_variants(
    row: PreviewRow, methods: dict[str, Normaliser], config: Config, generator: torch.Generator
) -> list[np.ndarray]:
    """The row's pictures, uint8 (H, W, 3), in the order of COLUMNS."""
    tile = row.tile.permute(1, 2, 0).numpy()
    source = {
        kind: method.fit(row.slide if config.stain_scope == "slide" else row.tile)
        for kind, method in methods.items()
    }
    stains = source["macenko"]
    assert isinstance(stains, StainProfile)
    hed, own = HedJitter(config.alpha, config.beta), StainJitter(3 * config.alpha, config.beta)
    tensors = [has_one_stain(row.tile, stains, stain) for stain in (0, 1)]
    tensors += [
        hed(row.tile, generator),
        hed(row.tile, generator),
        own(row.tile, generator, stains),
    ]
    normalised = [methods[kind].apply(tile, source[kind]) for kind in ("reinhard", "macenko")]
    return [tile, *normalised, *(tensor.permute(1, 2, 0).numpy() for tensor in tensors)]


def draw_page(rows: Sequence[tuple[str, list[np.ndarray]]], side: int) -> Image.Image:
    """All pictures on white, columns named once, rows by slide and corner."""
    font, small = load_caption_font(TITLE), load_caption_font(TEXT)
    step = side + GAP
    sheet = Image.new(
        "RGB", (GAP + step * len(COLUMNS), HEAD + (step + LABEL) * len(rows)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        draw.text(
            (GAP + column * step + side / 2, HEAD / 2), name, fill=INK, font=font, anchor="mm"
        )
    for line, (name, pictures) in enumerate(rows):
        top = HEAD + line * (step + LABEL)
        draw.text((GAP, top + 1), name, fill=QUIET, font=small)
        for column, pixels in enumerate(pictures):
            shown = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (GAP + column * step, top + LABEL))
    return sheet


def main(config: Config) -> None:
    for name in ("rows", "tile_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)}: expected at least 1")
    methods = {
        kind: build_normaliser(kind, config.stain_target, config.stain_scope)
        for kind in ("reinhard", "macenko")
    }
    chosen = {kind: method for kind, method in methods.items() if method is not None}
    path = Path(config.slides)
    paths = list(find_slides(config.slides).slides.values()) if path.is_dir() else [path]
    generator = torch.Generator().manual_seed(config.seed)
    share, rows = -(-config.rows // max(1, len(paths))), []
    for place in paths:
        if len(rows) >= config.rows:
            break
        try:
            with open_slide(place) as slide:
                found = read_rows(slide, min(share, config.rows - len(rows)), config.tile_size)
        except SlideError as error:
            if not path.is_dir():
                raise
            logger.warning("stain_preview: left out: %s", error)
            continue
        rows += [(row.name, make_variants(row, chosen, config, generator)) for row in found]
    if not rows:
        raise UserError(
            f"slides={config.slides}: expected tiles that can be read, found none; look with "
            "patch_encoder.inspect_slides"
        )
    with atomic_path(config.output) as temporary:
        draw_page(rows, min(config.tile_size, 224)).save(temporary, format="PNG")
    logger.info("stain_preview: %d tiles in %s", len(rows), config.output)


if __name__ == "__main__":
    launch(main, Config)
