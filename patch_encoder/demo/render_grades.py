"""Render prostate tissue of four grades: patches to learn from, and biopsies to grade.

Everything is drawn from the seed, so that a first training over resolutions needs no download. It
is a stand-in to run and test the pipeline with; a figure measured on it says nothing about
patients. The grade lies in fine detail that a reduced resolution loses.

    python -m patch_encoder.demo.render_grades output=runs/grades seed=0

Written: patches.csv (image, label, group, split, truth) with patches/<slide>/*.png, some training
labels one grade off and `truth` the drawn grade; ungraded.csv (image, group), further training
patches without a label, where they are asked for; slides/*.tiff (biopsies, pyramids of 1 um
per px), truth/*.png (0 on glass, else 1 + the grade's index, one px per level-0 px) and
biopsies.csv (slide_id and the px of each grade); cohort.json (the settings). Test patches and
biopsies are the same for every seed, so that trainings with several seeds are compared on them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patch_encoder.demo.cohort_folder import claim_folder
from patch_encoder.demo.histology.biopsy import draw_biopsy
from patch_encoder.demo.histology.glands import GRADES, draw_glands
from patch_encoder.demo.histology.scanner import SCANNERS, draw_stain, scan
from patch_encoder.demo.parallel import run_parallel
from patch_encoder.demo.pyramid import holds_pyramid, write_pyramid
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, sha256_bytes, write_csv
from wsi_common.progress import progress

DRAWING = 1
"""Rises when the drawing changes: pictures of two versions are never mixed."""
MPP = 1.0
"""Micrometres per pixel that glands are drawn for, that of SICAPv2."""
FIELD = 4
"""A slide has one field of FIELD x FIELD patches per grade."""
LEAST_EPITHELIUM = 0.3
"""Share of a patch that glands cover; patches of stroma alone have no grade."""
COLOURS = (255, 255, 255, 120, 190, 120, 240, 210, 70, 235, 130, 50, 190, 40, 50)
"""Of glass and the four grades in truth/*.png."""
UNGRADED = "ungraded"
"""Split of patches that get no label."""
logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the script."""

    output: str = key(REQUIRED, "where the results are written; the cohort", runtime=True)
    seed: int = key(0, "seed of everything that is drawn at random")
    patch_slides: int = key(12, "slides that training patches are cut from", least=1)
    ungraded_slides: int = key(
        0, "slides that further training patches are cut from; without labels", least=0
    )
    test_patch_slides: int = key(24, "slides that test patches are cut from", least=1)
    patch_side: int = key(48, "side of a patch, px at 1 um")
    misread_share: float = key(
        0.35, "share of training patches that are read one grade higher or lower"
    )
    biopsies: int = key(2, "slides of needle biopsies", least=0)
    biopsy_side: int = key(1280, "side of a slide of biopsies, px at 1 um")
    workers: int = key(0, "worker processes; 0: one per CPU core", runtime=True)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


@dataclass(frozen=True)
class PlannedPatches:
    """A slide that patches are cut from: its name, its seed, and its scanner."""

    slide: str
    seed: tuple[int, ...]
    scanner: str
    split: str


def main(config: Config) -> int:
    """Render what is missing, then write the tables."""
    check(config)
    root, settings = Path(config.output), {**identity(config), "drawing": DRAWING}
    claim_folder(root, "render_grades", settings, config.overwrite)
    comment = f"render_grades {sha256_bytes(repr(sorted(settings.items())).encode())[:16]}"
    draw = partial(render_biopsy, root=root, side=config.biopsy_side, comment=comment)
    with run_parallel(config.workers) as run:
        numbers = range(config.biopsies)
        areas = list(progress(run(draw, numbers), "biopsies", len(numbers), "slide"))
        write_csv(root / "biopsies.csv", ("slide_id", *GRADES), areas)
        if (root / "patches.csv").is_file():
            logger.info("%s: patches are there", root)
            return 0
        plans = plan_patches(config)
        cut = partial(render_patches, root=root, side=config.patch_side)
        found = list(progress(run(cut, plans), "patches", len(plans), "slide"))
    rows = [row for own in found for row in own]
    ungraded = [row for row in rows if row["split"] == UNGRADED]
    rows = [row for row in rows if row["split"] != UNGRADED]
    mislabel(rows, config.misread_share, config.seed)
    if ungraded:
        columns = ("image", "group")
        known = [{name: row[name] for name in columns} for row in ungraded]
        write_csv(root / "ungraded.csv", columns, known)
    write_csv(root / "patches.csv", ("image", "label", "group", "split", "truth"), rows)
    counts = (len(rows), len(ungraded), config.biopsies)
    logger.info("%s: %d patches, %d without a grade, %d biopsies", root, *counts)
    return 0


def check(config: Config) -> None:
    """Raise UserError on a number that cannot be drawn."""
    for name, low, high in (
        ("seed", 0, 2**63 - 1),
        ("patch_slides", 1, 999),
        ("ungraded_slides", 0, 999),
        ("test_patch_slides", 1, 999),
        ("patch_side", 16, 512),
        ("misread_share", 0, 1),
        ("biopsies", 0, 99),
        ("biopsy_side", 512, 8192),
        ("workers", 0, 1024),
    ):
        value = getattr(config, name)
        if not low <= value <= high:
            raise UserError(f"key '{name}': expected {low:g} to {high:g}, found {value:g}")


def plan_patches(config: Config) -> list[PlannedPatches]:
    """Every slide of training, ungraded and test patches; the scanners take turns."""
    first, last = config.patch_slides, config.patch_slides + config.ungraded_slides
    sides = (
        ("train", range(first), (1, config.seed)),
        (UNGRADED, range(first, last), (1, config.seed)),
        ("test", range(config.test_patch_slides), (2,)),
    )
    scanners = tuple(SCANNERS)
    return [
        PlannedPatches(f"{split}_{number:03d}", (*seed, number), scanners[number % 3], split)
        for split, numbers, seed in sides
        for number in numbers
    ]


def render_patches(plan: PlannedPatches, root: Path, side: int) -> list[dict[str, Any]]:
    """Write the patches of one slide; returns their rows of patches.csv, all labels right."""
    stain, rows = draw_stain(np.random.default_rng(plan.seed)), []
    shape = (FIELD * side, FIELD * side)
    for grade, name in enumerate(GRADES):
        rng = np.random.default_rng((*plan.seed, grade))
        tissue = draw_glands(rng, np.full(shape, grade), np.ones(shape, np.float32))
        pixels = scan(tissue.canvas, stain, SCANNERS[plan.scanner], rng)
        for number in range(FIELD * FIELD):
            top, left = (side * place for place in divmod(number, FIELD))
            part = slice(top, top + side), slice(left, left + side)
            if tissue.epithelium[part].mean() < LEAST_EPITHELIUM:
                continue
            image = f"patches/{plan.slide}/{name}_{number:02d}.png"
            with atomic_path(root / image) as temporary:
                Image.fromarray(pixels[part]).save(temporary, format="PNG")
            row = {"image": image, "label": name, "group": plan.slide, "split": plan.split}
            rows.append({**row, "truth": name})
    return rows


def mislabel(rows: Sequence[dict[str, Any]], share: float, seed: int) -> None:
    """Read a share of the training patches one grade higher or lower, as pathologists differ; what
    would lie beyond the first or the last grade keeps its label.
    """
    rng = np.random.default_rng((3, seed))
    own = [row for row in rows if row["split"] == "train"]
    for place in rng.permutation(len(own))[: round(share * len(own))].tolist():
        grade = GRADES.index(own[place]["truth"]) + int(rng.choice((-1, 1)))
        own[place]["label"] = GRADES[min(max(grade, 0), len(GRADES) - 1)]


def render_biopsy(number: int, root: Path, side: int, comment: str) -> dict[str, Any]:
    """Write a biopsy and its truth unless they are there; returns the px of each grade."""
    slide = f"biopsy_{number + 1:02d}"
    path, truth_path = root / "slides" / f"{slide}.tiff", root / "truth" / f"{slide}.png"
    if truth_path.is_file() and holds_pyramid(path, side, comment):
        with Image.open(truth_path) as image:
            truth = np.asarray(image)
    else:
        drawn = draw_biopsy((4, number), side, tuple(SCANNERS)[number % 3])
        truth = drawn.truth
        write_pyramid(path, drawn.pixels, MPP, comment)
        image = Image.fromarray(truth).convert("P")
        image.putdata(truth.ravel().tolist())
        image.putpalette(COLOURS)
        with atomic_path(truth_path) as temporary:
            image.save(temporary, format="PNG")
    counts = np.bincount(truth.ravel(), minlength=len(GRADES) + 1).tolist()
    return {"slide_id": slide, **dict(zip(GRADES, counts[1:]))}


if __name__ == "__main__":
    launch(main, Config)
