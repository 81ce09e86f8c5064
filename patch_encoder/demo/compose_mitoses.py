"""Compose small fields with known mitoses from published crops of mitotic figures: real pixels
where no open fields with annotations exist.

A field is 4 x 4 tiles of one slide, 84 px at 0.5 um. A positive field has one tile (12 %: two) with
a mitotic figure in its middle, a look-alike field one of the slide's darkest tiles without one; all
other tiles are tissue of the slide. Seams are equal in all fields. Slides are apart: those of a
split are in no other. A stand-in again: tiles are put side by side, so that nothing beyond 10 um
around a figure is real.

    python -m patch_encoder.demo.compose_mitoses crops=amibr_midog21 output=runs/figures

Written: images/*.tiff, MIDOG.json with the truth, cases.csv, copies of the annotations with wrong
labels in training fields and noise.csv (see histology/point_files.py), and cohort.json. What colour
alone says about the fields of split test is logged. A killed run goes on; fields that are there are
kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patch_encoder.demo.cohort_folder import claim_folder
from patch_encoder.demo.histology.colour_baseline import measure_colour, measure_darkness
from patch_encoder.demo.histology.composed_fields import (
    SIDE,
    ComposedField,
    compose_fields,
    divide_slides,
    draw_composed,
    locate_points,
)
from patch_encoder.demo.histology.figure_crops import TABLE, FigureTiles, read_slide_tiles
from patch_encoder.demo.histology.point_files import POINT_FILES, count_wrong, write_point_files
from patch_encoder.demo.pyramid import holds_pyramid, write_pyramid
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes, sha256_file
from wsi_common.progress import progress

MPP = 0.5
SPLITS = ("train", "val", "test")
logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the script."""

    output: str = key(REQUIRED, "where the results are written; the cohort", runtime=True)
    crops: str = key(
        REQUIRED, "folder of AMi-Br: patches/ and the table of its MIDOG 2021 part", path=True
    )
    split_shares: list[float] = key([0.6, 0.15, 0.25], "shares of the slides of train, val, test")
    field_counts: list[int] = key([3000, 600, 900], "fields of train, val and test")
    positive_fields: list[int] = key([800, 160, 250], "fields of each split with a mitosis")
    look_alike_fields: list[int] = key([300, 60, 90], "fields of each split with a look-alike")
    wrong_share: float = key(
        0.59,
        "share of the mitosis labels that are wrong in MIDOG_noisy.json, in split train; of fields",
    )
    seed: int = key(0, "seed of everything that is drawn at random")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def main(config: Config) -> int:
    """Compose what is missing, then write the annotations."""
    check(config)
    root = Path(config.output)
    settings = {**identity(config), "inputs": sha256_file(Path(config.crops) / TABLE)}
    slides, left_out = read_slide_tiles(Path(config.crops))
    logger.info("%s: %d crops with black borders left out", config.crops, left_out)
    fields = plan_fields(config, slides)
    claim_folder(root, "compose_mitoses", settings, config.overwrite)
    comment = f"compose_mitoses {sha256_bytes(repr(sorted(settings.items())).encode())[:16]}"
    for field in progress(fields, "fields", len(fields), "field"):
        path = root / "images" / field.file
        if not holds_pyramid(path, SIDE, comment):
            write_pyramid(path, draw_composed(field), MPP, comment)
    info = "fields composed of AMi-Br crops; see compose_mitoses"
    if not (root / POINT_FILES[-1]).is_file():
        points = [locate_points(field) for field in fields]
        wrong = count_wrong(config.positive_fields[0], config.wrong_share)
        write_point_files(root, points, MPP, wrong, config.seed, info)
    parts = [[field for field in fields if field.split == split] for split in ("train", "test")]
    logger.info("%s: %d fields; %s", root, len(fields), describe_colour(*parts))
    return 0


def check(config: Config) -> None:
    """Raise UserError on numbers that make no set."""
    for name in ("split_shares", "field_counts", "positive_fields", "look_alike_fields"):
        values = getattr(config, name)
        if len(values) != len(SPLITS) or min(values) < 0:
            raise UserError(f"key '{name}': expected three numbers from 0, found {values}")
    if abs(sum(config.split_shares) - 1) > 1e-6:
        raise UserError(f"key 'split_shares': expected a sum of 1, found {config.split_shares}")
    for split, whole, *parts in zip(
        SPLITS, config.field_counts, config.positive_fields, config.look_alike_fields, strict=True
    ):
        if sum(parts) > whole:
            raise UserError(
                f"key 'field_counts': expected at least {sum(parts)} for {split}, found {whole}"
            )
    if not 0 <= config.wrong_share <= 0.95:
        raise UserError(f"key 'wrong_share': expected 0 to 0.95, found {config.wrong_share:g}")


def plan_fields(config: Config, slides: Sequence[FigureTiles]) -> list[ComposedField]:
    """The fields of all splits, whose slides are apart."""
    parts = divide_slides(slides, config.split_shares, config.seed)
    fields = []
    for number, split in enumerate(SPLITS):
        fields += compose_fields(
            split,
            parts[number],
            config.field_counts[number],
            config.positive_fields[number],
            config.look_alike_fields[number],
            (config.seed, 3, number),
        )
    return fields


def describe_colour(train: Sequence[ComposedField], test: Sequence[ComposedField]) -> str:
    """What can be known of the test fields without looking at shapes: a sentence with two AUCs."""
    pixels = [[draw_composed(field) for field in part] for part in (train, test)]
    positive = [np.array([len(f.figures) > 0 for f in part], np.int64) for part in (train, test)]
    if any(len(np.unique(labels)) < 2 for labels in positive):
        return "no AUC of colour, because a split has one class"
    learned = measure_colour(*pixels, *positive)
    darkest = measure_darkness(pixels[1], positive[1])
    return (
        f"AUC of mitosis or not on split test by 33 colour numbers {learned:.3f}, by darkness "
        f"{darkest:.3f}"
    )


if __name__ == "__main__":
    launch(main, Config)
