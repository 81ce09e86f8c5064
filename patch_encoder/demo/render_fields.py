"""Render H&E fields with annotated mitotic figures and look-alikes, of three invented scanners.

Everything is drawn from the seed, so that a first training for mitoses needs no download. It is a
stand-in to run and test the pipeline with; a figure measured on it says nothing about patients.
Look-alikes are as dark as mitoses, so that colour does not tell them apart.

    python -m patch_encoder.demo.render_fields output=runs/fields seed=0

Written: images/*.tiff, MIDOG.json with the truth, cases.csv (file, case, scanner, mpp, split),
copies of the annotations with wrong labels in training fields and noise.csv (see
histology/point_files.py), and cohort.json (the settings). A killed run goes on where it stopped;
fields that are there and whole are kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from patch_encoder.demo.cohort_folder import claim_folder
from patch_encoder.demo.histology.field import FieldPlan, draw_field, place_cells
from patch_encoder.demo.histology.point_files import (
    POINT_FILES,
    PointField,
    count_wrong,
    write_point_files,
)
from patch_encoder.demo.histology.scanner import SCANNERS
from patch_encoder.demo.parallel import run_parallel
from patch_encoder.demo.pyramid import holds_pyramid, write_pyramid
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes
from wsi_common.progress import progress

DRAWING = 2
"""Rises when the drawing changes: pictures of two versions are never mixed."""
MPP = 0.5
"""Micrometres per pixel that cells are drawn for."""
SPLITS = ("train", "train", "val", "train", "test", "train", "val", "test")
"""Splits of the cases of one scanner, in turn: the first eight are 4 : 2 : 2."""
logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the script."""

    output: str = key(REQUIRED, "where the results are written; the cohort", runtime=True)
    seed: int = key(0, "seed of everything that is drawn at random")
    cohort_cases: int = key(24, "cases; a third of them per scanner, 15 or more", least=15)
    fields_per_case: int = key(2, "fields per case", least=1)
    field_side: int = key(1000, "side of a field, px")
    wrong_share: float = key(
        0.59,
        "share of the mitosis labels that are wrong in MIDOG_noisy.json, in split train; of points",
    )
    workers: int = key(0, "worker processes; 0: one per CPU core", runtime=True)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


@dataclass(frozen=True)
class PlannedPicture:
    """One field: its row of cases.csv, and how it is drawn."""

    file: str
    case: str
    split: str
    plan: FieldPlan


def main(config: Config) -> int:
    """Render what is missing, then write the annotations."""
    check(config)
    root, settings = Path(config.output), {**identity(config), "drawing": DRAWING}
    claim_folder(root, "render_fields", settings, config.overwrite)
    comment = f"render_fields {sha256_bytes(repr(sorted(settings.items())).encode())[:16]}"
    pictures = plan_pictures(config)
    if (root / POINT_FILES[-1]).is_file() and all(
        holds_pyramid(root / "images" / picture.file, config.field_side, comment)
        for picture in pictures
    ):
        logger.info("%s: all %d fields are there", root, len(pictures))
        return 0
    draw = partial(render_picture, folder=root / "images", comment=comment)
    with run_parallel(config.workers) as run:
        fields = list(progress(run(draw, pictures), "fields", len(pictures), "field"))
    true = sum(len(field.mitoses) for field in fields if field.split == "train")
    wrong = count_wrong(true, config.wrong_share)
    info = "rendered H&E fields; see render_fields"
    write_point_files(root, fields, MPP, wrong, config.seed, info)
    logger.info(
        "%s: %d fields, %d mitoses, %d look-alikes",
        root,
        len(fields),
        sum(len(field.mitoses) for field in fields),
        sum(len(field.look_alikes) for field in fields),
    )
    return 0


def check(config: Config) -> None:
    """Raise UserError on a number that cannot be drawn."""
    for name, low, high in (
        ("seed", 0, 2**63 - 1),
        ("cohort_cases", 15, 999),
        ("fields_per_case", 1, 99),
        ("field_side", 128, 4096),
        ("wrong_share", 0, 0.95),
        ("workers", 0, 1024),
    ):
        value = getattr(config, name)
        if not low <= value <= high:
            raise UserError(f"key '{name}': expected {low:g} to {high:g}, found {value:g}")


def plan_pictures(config: Config) -> list[PlannedPicture]:
    """All fields in the order of their names; the scanners take turns, case by case."""
    pictures = []
    for case in range(config.cohort_cases):
        scanner = tuple(SCANNERS)[case % len(SCANNERS)]
        for number in range(config.fields_per_case):
            plan = FieldPlan(
                config.field_side, scanner, (config.seed, 1, case), (config.seed, 2, case, number)
            )
            split = SPLITS[case // len(SCANNERS) % len(SPLITS)]
            name = f"{case + 1:03d}_{number + 1:02d}.tiff"
            pictures.append(PlannedPicture(name, f"{case + 1:03d}", split, plan))
    return pictures


def render_picture(picture: PlannedPicture, folder: Path, comment: str) -> PointField:
    """Write `<folder>/<file>` unless it is there and whole; returns its annotation."""
    plan, path = picture.plan, folder / picture.file
    cells = place_cells(plan)
    if not holds_pyramid(path, plan.side, comment):
        write_pyramid(path, draw_field(plan, cells), MPP, comment)
    return PointField(
        picture.file,
        picture.case,
        plan.scanner,
        picture.split,
        plan.side,
        cells.mitoses,
        cells.look_alikes,
        cells.others,
    )


if __name__ == "__main__":
    launch(main, Config)
