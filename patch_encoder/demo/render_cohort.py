"""Render the embedded cohort: Papanicolaou-stained smears with slide labels, and fields with boxes
for the detector.

Everything is drawn from the seed, so that the quickstart needs no download and two machines hold
the same pixels. It is a stand-in to run and test the pipeline with; a figure measured on it says
nothing about patients.

    python -m patch_encoder.demo.render_cohort output=runs/cohort seed=0

Written: labels.csv, slides/*.tiff (pyramids), detection/{train,val}.json with
detection/images/*.jpg (boxes around whole abnormal cells), annotations.json (the same boxes for the
slides, level-0 px), with `tissue_map=true` zones/*.png (which zone lies where; see
cytology/tissue_map.py), and cohort.json (the settings). A killed run goes on where it stopped;
slides and fields that are there and whole are kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from patch_encoder.demo.cohort_folder import LABEL_COLUMNS, claim_folder, make_coco_document
from patch_encoder.demo.cytology.sample_plan import (
    PlannedField,
    PlannedSlide,
    plan_fields,
    plan_slides,
    render_field,
    render_slide,
)
from patch_encoder.demo.cytology.smear import Box
from patch_encoder.demo.cytology.tissue_map import write_tissue_map
from patch_encoder.demo.parallel import run_parallel
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes, write_csv, write_json
from wsi_common.progress import progress

DRAWING = 1
"""Rises when the drawing changes: pictures of two versions are never mixed."""
CATEGORY = "lesion"
SMALLEST_SIDE = 256
LARGEST_SIDE = 16384
logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the script."""

    output: str = key(REQUIRED, "where the results are written; the cohort", runtime=True)
    seed: int = key(0, "seed of everything that is drawn at random")
    side: int = key(1536, "side of a slide at level 0, px")
    mpp: float = key(
        0.5, "micrometres per pixel at level 0; written into the slides; cells are drawn for 0.5"
    )
    pretrain_slides: int = key(
        24, "slides of split pretrain (for ranking and distillation), half of them positive"
    )
    cv_slides: int = key(60, "slides of split cv (for cross-validation), half of them positive")
    double_share: float = key(0.25, "share of the patients that have two slides, 0 to 1")
    tissue_map: bool = key(
        False,
        "give each slide 3 to 5 zones; sparse, dense, inflamed, mucus_blood or clusters, recorded "
        "in zones/<slide_id>.png",
    )
    field_side: int = key(256, "side of a field, px")
    train_fields: int = key(240, "detection fields for training")
    val_fields: int = key(60, "detection fields for validation")
    workers: int = key(0, "worker processes; 0: one per CPU core", runtime=True)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def main(config: Config) -> int:
    """Render what is missing, then write the tables."""
    check(config)
    root = Path(config.output)
    settings = {**identity(config), "drawing": DRAWING}
    if not config.tissue_map:
        del settings["tissue_map"]  # a cohort without zones is the one it was before there were any
    claim_folder(root, "sample_cohort", settings, config.overwrite)
    slides = plan_slides(
        config.seed,
        config.side,
        {"pretrain": config.pretrain_slides, "cv": config.cv_slides},
        config.double_share,
        config.tissue_map,
    )
    fields = plan_fields(
        config.seed, config.field_side, {"train": config.train_fields, "val": config.val_fields}
    )
    comment = f"sample_cohort {sha256_bytes(repr(sorted(settings.items())).encode())[:16]}"
    draw_slide = partial(render_slide, folder=root / "slides", mpp=config.mpp, comment=comment)
    draw_field = partial(render_field, folder=root / "detection" / "images")
    with run_parallel(config.workers) as run:
        slide_boxes = list(progress(run(draw_slide, slides), "slides", len(slides), "slide"))
        field_boxes = list(progress(run(draw_field, fields), "fields", len(fields), "field"))
    for slide in slides:
        if tissue := slide.tissue():
            write_tissue_map(root / "zones" / f"{slide.slide_id}.png", tissue)
    write_slide_tables(root, slides, slide_boxes, config.side)
    write_field_tables(root, fields, field_boxes)
    logger.info("%s: %d slides, %d fields", root, len(slides), len(fields))
    return 0


def check(config: Config) -> None:
    """Raise UserError on a number that cannot be drawn."""
    for name, low, high in (
        ("seed", 0, 2**63 - 1),
        ("side", SMALLEST_SIDE, LARGEST_SIDE),
        ("mpp", 1e-3, 1e3),
        ("pretrain_slides", 0, 9999),
        ("cv_slides", 0, 9999),
        ("double_share", 0, 1),
        ("field_side", 64, LARGEST_SIDE),
        ("train_fields", 0, 9999),
        ("val_fields", 0, 9999),
        ("workers", 0, 1024),
    ):
        value = getattr(config, name)
        if not low <= value <= high:
            raise UserError(f"key '{name}': expected {low:g} to {high:g}, found {value:g}")


def write_slide_tables(
    root: Path, slides: list[PlannedSlide], boxes: list[list[Box]], side: int
) -> None:
    """labels.csv (mpp stays empty: the slides carry it) and annotations.json."""
    rows: list[dict[str, Any]] = [
        {
            "case_id": s.case_id,
            "slide_id": s.slide_id,
            "label": s.label,
            "split": s.split,
            "mpp": "",
        }
        for s in slides
    ]
    images = [(f"slides/{s.slide_id}.tiff", side, side) for s in slides]
    write_json(root / "annotations.json", make_coco_document(images, find_named(boxes), [CATEGORY]))
    write_csv(root / "labels.csv", LABEL_COLUMNS, rows)


def write_field_tables(root: Path, fields: list[PlannedField], boxes: list[list[Box]]) -> None:
    """detection/train.json and detection/val.json."""
    for subset in ("train", "val"):
        chosen = [
            (field, own) for field, own in zip(fields, boxes, strict=True) if field.subset == subset
        ]
        images = [(field.name, field.side, field.side) for field, _ in chosen]
        document = make_coco_document(images, find_named([own for _, own in chosen]), [CATEGORY])
        write_json(root / "detection" / f"{subset}.json", document)


def find_named(boxes: list[list[Box]]) -> list[list[tuple[str, Box]]]:
    """The category before each box."""
    return [[(CATEGORY, box) for box in own] for own in boxes]


if __name__ == "__main__":
    launch(main, Config)
