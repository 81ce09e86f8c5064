"""A cohort's feature bags, checked before any training starts: in memory up to a budget, on disk
beyond it.

Bags in memory keep the precision of their file: N x D x 2 or 4 bytes a slide (10,000 tiles of 1,024
features in half
precision: 20 MB). Bags on disk are read at every use, ahead of the device
(mil/training/prefetch.py). Results do not depend on where a bag lies.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from common.errors import UserError
from common.files import sha256_bytes
from common.memory import free_memory
from mil.ops.slide_coords import SlideCoords, on_slide
from patch_encoder.bags.bag import StoredBag, check_finite, open_bag
from patch_encoder.bags.files import bag_digest, bag_files
from patch_encoder.tiles.coordinates import FULL_GEOMETRY, TileGeometry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bags:
    """Bags of one encoder, by slide id.

    Attributes:
        features: (N, D) each, float16 or float32 as stored; a StoredBag for those beyond the memory
            budget.
        coords: (N, 2) int64 level-0 corners each, on their slide's grid (`SlideCoords`), None where
            the file has none.
        attributes: attributes of each file: tile geometry and provenance.
        dim: D.
    """

    features: dict[str, Tensor | StoredBag]
    coords: dict[str, Tensor | None]
    attributes: dict[str, dict[str, Any]]
    dim: int


def find_bags(
    folder: str | Path, slide_ids: Sequence[str], *, skip_missing: bool = False
) -> dict[str, Path]:
    """Bag file of every slide, in the order of `slide_ids`.

    Raises:
        UserError: slides without a bag, all of them in one line, unless `skip_missing`, which logs
            the line.
    """
    found = bag_files(folder)
    missing = [slide for slide in slide_ids if slide not in found]
    if missing:
        names = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        line = f"{folder}: {len(missing)} of {len(slide_ids)} labelled slides have no bag: {names}"
        if not skip_missing or len(missing) == len(slide_ids):
            raise UserError(f"{line}; extract them or set skip_missing=true")
        logger.warning("%s; left out", line)
    return {slide: found[slide] for slide in slide_ids if slide in found}


def load_bags(files: Mapping[str, Path], memory: int | None = None) -> Bags:
    """Open and check all bags, and read them as far as `memory` bytes go (None: half of what is
    free).

    Raises:
        UserError: every bag that is unreadable, empty, not finite or of another width than most, in
            one line.
    """
    budget = free_memory() // 2 if memory is None else memory
    opened, problems = _opened(files)
    bags = Bags({}, {}, {}, next((bag.shape[1] for bag in opened.values()), 0))
    for slide, bag in opened.items():
        held = bag.read() if bag.nbytes <= budget else None
        budget -= 0 if held is None else bag.nbytes
        if _is_finite(bag, held, slide, problems):
            bags.features[slide] = bag if held is None else held
            bags.attributes[slide] = bag.attributes
            bags.coords[slide] = None if bag.coords is None else placed(bag.coords, bag.attributes)
    if problems:
        raise UserError(_all_of(problems, len(files)))
    left = sum(isinstance(features, StoredBag) for features in bags.features.values())
    if left:
        logger.info(
            "bags: %d of %d stay on disk and are read at every use (ram_gb)", left, len(files)
        )
    return bags


def placed(coords: Int[Tensor, "n 2"], attributes: Mapping[str, Any]) -> SlideCoords:
    """A bag's coords on the grid that its attributes state; where these leave it open, the coords
    themselves decide.
    """
    try:
        geometry = TileGeometry.from_attributes(attributes, "")
        step, side = geometry.step, max(0, geometry.patch_size_level0)
    except (
        UserError,
        ValueError,
        TypeError,
        ArithmeticError,
    ):  # whoever reads tiles says what is wrong with their size
        return on_slide(coords)
    stated = (
        "overlap" in attributes or FULL_GEOMETRY in attributes
    )  # CLAM writes its patch size, but not its step
    return on_slide(coords, step if stated else 0, side)


def usable_bags(files: Mapping[str, Path]) -> dict[str, Path]:
    """The files that `load_bags` takes; the others are logged. Every feature is read once."""
    opened, problems = _opened(files)
    good = {
        slide: files[slide]
        for slide, bag in opened.items()
        if _is_finite(bag, None, slide, problems)
    }
    if problems and not good:
        raise UserError(_all_of(problems, len(files)))
    if problems:
        logger.warning("%s; left out", _all_of(problems, len(files)))
    return good


def _opened(files: Mapping[str, Path]) -> tuple[dict[str, StoredBag], dict[str, str]]:
    """Headers of the bags, and what is wrong with the others."""
    opened: dict[str, StoredBag] = {}
    problems: dict[str, str] = {}
    for slide, path in files.items():
        try:
            opened[slide] = open_bag(path)
        except UserError as error:
            problems[slide] = str(error)
    widths = Counter(bag.shape[1] for bag in opened.values())
    width = widths.most_common(1)[0][0] if widths else 0
    example = next((slide for slide, bag in opened.items() if bag.shape[1] == width), "")
    for slide in [slide for slide, bag in opened.items() if bag.shape[1] != width]:
        bag = opened.pop(slide)
        problems[slide] = (
            f"{bag.path}: expected {width} features as in slide {example}, found {bag.shape[1]} "
            f"in {slide}; use one encoder"
        )
    return opened, problems


def _is_finite(
    bag: StoredBag, features: Tensor | None, slide: str, problems: dict[str, str]
) -> bool:
    try:
        check_finite(bag, features)
    except UserError as error:
        problems[slide] = str(error)
    return slide not in problems


def _all_of(problems: Mapping[str, str], count: int) -> str:
    """One line for all bad bags; one alone keeps its own."""
    lines = list(problems.values())
    if len(lines) == 1:
        return lines[0]
    shown = " | ".join(lines[:10]) + (" | ..." if len(lines) > 10 else "")
    names = ", ".join(list(problems)[:10])
    return (
        f"{len(lines)} of {count} bags cannot be used ({names}); skip_bad=true leaves them "
        f"out: {shown}"
    )


def memory_of(ram_gb: float, workers: int = 1) -> int:
    """Bytes for the bags of each of `workers` processes; 0 GB: half of what is free, shared by
    them.
    """
    if ram_gb < 0:
        raise UserError(
            f"ram_gb={ram_gb}: expected gigabytes for the bags of a process, or 0 for half of the "
            "free memory"
        )
    return int(ram_gb * 1e9) if ram_gb else free_memory() // 2 // max(1, workers)


def bags_digest(files: Mapping[str, Path]) -> str:
    """Fingerprint of a set of bags: changes with any slide, feature or coordinate.

    Raises:
        UserError: as `load_bags`, whose checks the bags of others go through here first.
    """
    _, problems = _opened(files)
    lines = []
    for slide, path in sorted(files.items()):
        if slide in problems:
            continue
        try:
            lines.append(f"{slide}:{bag_digest(path)}\n".encode())
        except UserError as error:
            problems[slide] = str(error)
    if problems:
        raise UserError(_all_of(problems, len(files)))
    return sha256_bytes(*lines)
