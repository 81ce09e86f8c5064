"""Compose slides from small pictures of known kinds: real pixels whose regions have known zones,
where no open slides of the kind exist.

Every picture becomes one region of a slide, and its kind, which is its file name without the number
at the end, is the zone of that region. Pictures with consecutive numbers are often of one patient
and look alike. A row of a slide is therefore a run of pictures of one kind whose numbers differ in
the last digit alone, and no run is in two slides; what is left of a run is not used. Positive
slides have more rows of the positive kinds. `nuisance` gives every slide a stain of its own on top
of what the pictures bring. A stand-in again: nobody says whose the pictures are, so that a figure
measured on it says nothing about patients.

    python -m patch_encoder.demo.compose_regions fields=oral_oscc_he output=runs/oral_regions

Written: labels.csv, slides/*.tiff (pyramids), coords/*.h5 (all tiles), zones.csv (the corner and
the kind of each picture) and cohort.json. A killed run goes on; slides that are there are kept.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from patch_encoder.demo.cohort_folder import LABEL_COLUMNS, claim_folder
from patch_encoder.demo.pyramid import write_pyramid
from patch_encoder.demo.region_simulation import ZONE_COLUMNS
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry, write_coordinates
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes, write_csv
from wsi_common.progress import progress

NAME = re.compile(r"(.+?)[-_ ]*(\d+)")
STAIN_SPREAD, LAMP_SPREAD = 0.25, 0.08
logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the script."""

    output: str = key(REQUIRED, "where the results are written; the cohort", runtime=True)
    fields: str = key(REQUIRED, "folder tree of pictures; <kind>_<number>.jpg or .png", path=True)
    positive_kinds: str = key("OSCC", "beginning of the kinds that positive slides have more of")
    cohort_slides: int = key(40, "slides; half of them positive", least=2)
    rows_of_regions: int = key(3, "runs of pictures per slide, one below the other", least=1)
    columns_of_regions: int = key(9, "pictures of a run, 1 to 10; shorter runs are left out")
    picture_side: int = key(224, "side that pictures are resized to, px; a region")
    tile: int = key(56, "side of a tile, px")
    positive_shares: list[float] = key(
        [0.6, 0.9], "expected share of the positive kinds in negative and in positive slides"
    )
    nuisance: float = key(0.0, "how much slides differ in stain and lamp; 1: a strong difference")
    seed: int = key(0, "seed of everything that is drawn at random")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


@dataclass(frozen=True)
class ComposedRegions:
    """One slide: its pictures row by row."""

    slide_id: str
    label: str
    pictures: list[Path]


def find_runs(folder: Path, length: int) -> dict[str, list[list[Path]]]:
    """Kind -> runs of `length` pictures, in the order of their numbers.

    Raises:
        UserError: no pictures, or a name without a number.
    """
    runs: dict[tuple[str, int], list[tuple[int, Path]]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in {".jpg", ".jpeg", ".png"}:
            continue
        found = NAME.fullmatch(path.stem)
        if found is None:
            raise UserError(f"{path}: expected a name such as <kind>_<number>, found no number")
        number = int(found[2])
        runs.setdefault((found[1], number // 10), []).append((number, path))
    if not runs:
        raise UserError(f"fields={folder}: expected .jpg or .png files, found none")
    kinds: dict[str, list[list[Path]]] = {}
    for (kind, _), numbered in sorted(runs.items()):
        if len(numbered) >= length:
            kinds.setdefault(kind, []).append([path for _, path in sorted(numbered)[:length]])
    return kinds


def plan_slides(kinds: dict[str, list[list[Path]]], config: Config) -> list[ComposedRegions]:
    """Deal the runs out.

    Raises:
        UserError: too few runs, or no positive kind.
    """
    rng = np.random.default_rng((config.seed, 1))
    positive = [r for kind, own in kinds.items() for r in own if _is_positive(kind, config)]
    others = [r for kind, own in kinds.items() for r in own if not _is_positive(kind, config)]
    size, count = config.rows_of_regions, config.cohort_slides
    if not positive or not others or len(positive) + len(others) < size * count:
        raise UserError(
            f"fields={config.fields}: expected {size * count} runs of "
            f"{config.columns_of_regions} pictures for {count} slides, found {len(positive)} of "
            f"the kinds '{config.positive_kinds}...' and {len(others)} others; lower "
            "cohort_slides or correct positive_kinds"
        )
    labels = ["negative", "positive"] * (count // 2) + ["negative"] * (count % 2)
    wanted = [
        int(rng.binomial(size, config.positive_shares[label == "positive"])) for label in labels
    ]
    _fit(wanted, len(positive), size * count - len(others), size)
    piles = [[pile[i] for i in rng.permutation(len(pile))] for pile in (positive, others)]
    slides = []
    for number, (label, share) in enumerate(zip(labels, wanted, strict=True), 1):
        own = [piles[0].pop() for _ in range(share)]
        own += [piles[1].pop() for _ in range(size - share)]
        pictures = [path for i in rng.permutation(size) for path in own[i]]
        slides.append(ComposedRegions(f"P{number:04d}", label, pictures))
    return slides


def _is_positive(kind: str, config: Config) -> bool:
    return kind.startswith(config.positive_kinds)


def _fit(wanted: list[int], most: int, least: int, size: int) -> None:
    """Change the numbers of positive runs until there are enough of both."""
    while sum(wanted) > most:
        wanted[wanted.index(max(wanted))] -= 1
    while sum(wanted) < least:
        wanted[wanted.index(min(wanted))] += 1
    assert min(wanted) >= 0 and max(wanted) <= size, wanted


def draw_slide(slide: ComposedRegions, number: int, config: Config) -> np.ndarray:
    """Its pixels (H, W, 3): the pictures side by side, in the slide's stain."""
    side, columns = config.picture_side, config.columns_of_regions
    canvas = np.empty((config.rows_of_regions * side, columns * side, 3), np.uint8)
    for place, path in enumerate(slide.pictures):
        y, x = place // columns * side, place % columns * side
        with Image.open(path) as image:
            picture = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        canvas[y : y + side, x : x + side] = np.asarray(picture)
    if not config.nuisance:
        return canvas
    rng = np.random.default_rng((config.seed, 2, number))
    # the optical density of each channel, and the light that falls through empty glass
    strength = np.exp(config.nuisance * STAIN_SPREAD * rng.standard_normal(3))
    lamp = 1 - config.nuisance * LAMP_SPREAD * rng.random(3)
    levels = np.arange(256)[:, None] / 255
    table = np.rint(255 * lamp * levels**strength).astype(np.uint8)
    return np.stack([table[:, c].take(canvas[..., c]) for c in range(3)], axis=-1)


def write_slide(
    root: Path, slide: ComposedRegions, number: int, config: Config, comment: str
) -> None:
    """Write the slide and the coordinates of its tiles, which appear last."""
    coords = root / "coords" / f"{slide.slide_id}.h5"
    if coords.is_file():
        return
    picture = draw_slide(slide, number, config)
    write_pyramid(root / "slides" / f"{slide.slide_id}.tiff", picture, 0.5, comment)
    height, width = picture.shape[:2]
    grid = np.meshgrid(np.arange(width // config.tile), np.arange(height // config.tile))
    corners = np.stack(grid, -1).reshape(-1, 2) * config.tile
    size = (config.tile, config.tile, 0, config.tile, 0.5, 0.5, 0.0, width, height)
    write_coordinates(coords, Coordinates(corners, TileGeometry(slide.slide_id, *size)))


def main(config: Config) -> int:
    """Plan all slides, then write what is missing and the tables."""
    if config.tile < 16 or config.picture_side % config.tile:
        raise UserError(
            f"tile={config.tile}: expected 16 or more and a divisor of "
            f"picture_side={config.picture_side}, so that "
            "a picture is a whole number of tiles"
        )
    root, source = Path(config.output), Path(config.fields)
    slides = plan_slides(find_runs(source, config.columns_of_regions), config)
    names = [str(path.relative_to(source)) for slide in slides for path in slide.pictures]
    settings = {**identity(config), "inputs": sha256_bytes("\n".join(names).encode())}
    claim_folder(root, "compose_regions", settings, config.overwrite)
    comment = f"compose_regions {sha256_bytes(repr(sorted(settings.items())).encode())[:16]}"
    for number, slide in enumerate(progress(slides, "slides", len(slides), "slide")):
        write_slide(root, slide, number, config, comment)
    zones = [
        {
            "slide_id": slide.slide_id,
            "x": place % config.columns_of_regions * config.picture_side,
            "y": place // config.columns_of_regions * config.picture_side,
            "label": NAME.fullmatch(path.stem)[1],  # type: ignore[index]
        }
        for slide in slides
        for place, path in enumerate(slide.pictures)
    ]
    write_csv(root / "zones.csv", ZONE_COLUMNS, zones)
    rows = [
        {"case_id": s.slide_id, "slide_id": s.slide_id, "label": s.label, "split": "cv", "mpp": 0.5}
        for s in slides
    ]
    write_csv(root / "labels.csv", LABEL_COLUMNS, rows)
    logger.info("%s: %d slides of %d pictures", root, len(slides), len(slides[0].pictures))
    return 0


if __name__ == "__main__":
    launch(main, Config)
