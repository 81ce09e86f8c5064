"""A cohort's feature bags, checked before any training starts: in memory up to a budget, on disk
beyond it.

Bags in memory keep the precision of their file: N x D x 2 or 4 bytes per slide (10,000 tiles of
1,024 features in half precision: 20 MB). Bags on disk are read at every use, ahead of the device
(mil/training/prediction.py). Results do not depend on where a bag lies.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mil.datasets.splits import list_names
from patch_encoder.bags.bag import Bag, open_bag, slide_grid
from patch_encoder.bags.paths import list_bags
from patch_encoder.tiles.slide_grid import SlideGrid
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes
from wsi_common.memory import free_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One labelled bag.

    Attributes:
        slide_id: slide that the bag is of.
        bag: features and coords, in memory or on disk.
        target: as mil.tasks has it: a class, or a vector.
        stratum: the class that balanced sampling sees where the target is no class.
        covariates: (V,) encoded, for models that are fused with them.
    """

    slide_id: str
    bag: Bag
    target: int | Tensor
    stratum: int = 0
    covariates: Tensor | None = None

    def load(self, tiles: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features, as they are stored, and coords; of the given tiles only, or of all."""
        coords = self.bag.coords
        if tiles is None:
            return self.bag.read(), coords
        return self.bag.rows(tiles), None if coords is None else coords[tiles]

    @cached_property
    def grid(self) -> SlideGrid | None:
        """The grid of all tiles of the slide, whichever are loaded; None without coords."""
        return slide_grid(self.bag)


def find_bags(
    folder: str | Path, slide_ids: Sequence[str], *, skip_missing: bool | None = None
) -> dict[str, Path]:
    """Bag file of every slide, in the order of `slide_ids`.

    Args:
        folder: of the bags.
        slide_ids: the slides.
        skip_missing: leave out those without a bag; None: as False, in a script without that key.

    Raises:
        UserError: slides without a bag, all of them in one line, unless `skip_missing`, which logs
            the line.
    """
    found = list_bags(folder)
    missing = [slide for slide in slide_ids if slide not in found]
    if missing:
        count = f"{len(missing)} of {len(slide_ids)} labelled slides have no bag"
        line = f"{folder}: {count}: {list_names(missing, 10)}"
        if not skip_missing or len(missing) == len(slide_ids):
            remedy = "" if skip_missing is None else " or set skip_missing=true"
            raise UserError(f"{line}; extract them{remedy}")
        logger.warning("%s; left out", line)
    return {slide: found[slide] for slide in slide_ids if slide in found}


def load_bags(files: Mapping[str, Path], memory: int | None = None) -> dict[str, Bag]:
    """Open and check all bags of an encoder, and read them as far as `memory` bytes go (None: half
    of what is free).

    Raises:
        UserError: every bag that is unreadable, empty, not finite or of another width than most, in
            one line.
    """
    budget = free_memory() // 2 if memory is None else memory
    bags, problems = _open_bags(files)
    for slide, bag in bags.items():
        if bag.nbytes <= budget:
            budget -= bag.nbytes
            bags[slide] = bag.load()
        _check_finite(bags[slide], slide, problems)
    if problems:
        raise UserError(_join_problems(problems, len(files)))
    if left := sum(bag.features is None for bag in bags.values()):
        line = "bags: %d of %d stay on disk and are read at every use (ram_gb)"
        logger.info(line, left, len(files))
    return bags


def select_usable_bags(files: Mapping[str, Path]) -> dict[str, Path]:
    """The files that `load_bags` takes; the others are logged. Every feature is read once."""
    bags, problems = _open_bags(files)
    for slide, bag in bags.items():
        _check_finite(bag, slide, problems)
    good = {slide: files[slide] for slide in bags if slide not in problems}
    if problems and not good:
        raise UserError(_join_problems(problems, len(files)))
    if problems:
        logger.warning("%s; left out", _join_problems(problems, len(files)))
    return good


def _open_bags(files: Mapping[str, Path]) -> tuple[dict[str, Bag], dict[str, str]]:
    """The bags, features on disk, and what is wrong with those that cannot be opened."""
    opened: dict[str, Bag] = {}
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


def _check_finite(bag: Bag, slide: str, problems: dict[str, str]) -> None:
    try:
        bag.check_finite()
    except UserError as error:
        problems[slide] = str(error)


def _join_problems(problems: Mapping[str, str], count: int) -> str:
    """One line for all bad bags; one alone keeps its own."""
    lines = list(problems.values())
    if len(lines) == 1:
        return f"{lines[0]}, or leave it out with skip_bad=true"
    shown = " | ".join(lines[:10]) + (" | ..." if len(lines) > 10 else "")
    names = ", ".join(list(problems)[:10])
    return (
        f"{len(lines)} of {count} bags cannot be used ({names}); skip_bad=true leaves them "
        f"out: {shown}"
    )


def choose_memory(ram_gb: float, workers: int = 1) -> int:
    """Bytes for the bags of each of `workers` processes; 0 GB: half of what is free, shared by
    them.
    """
    if ram_gb < 0:
        raise UserError(
            f"ram_gb={ram_gb}: expected gigabytes for the bags of a process, or 0 for half of the "
            "free memory"
        )
    return int(ram_gb * 1e9) if ram_gb else free_memory() // 2 // max(1, workers)


def digest_each(
    files: Mapping[str, Path], cases: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Slide id -> digest of the content of its bag, which changes with any feature or coordinate.

    Args:
        files: slide id -> bag.
        cases: slide id -> patient; two patients with the same bag, who may stand on two sides of a
            split, are logged.

    Raises:
        UserError: as `load_bags`, whose checks the bags of others go through here first.
    """
    bags, problems = _open_bags(files)
    digests: dict[str, str] = {}
    for slide, bag in sorted(bags.items()):
        try:
            digests[slide] = bag.digest()
        except UserError as error:
            problems[slide] = str(error)
    if problems:
        raise UserError(_join_problems(problems, len(files)))
    _say_twins(digests, cases or {})
    return digests


def digest_bags(files: Mapping[str, Path]) -> str:
    """Fingerprint of a set of bags: changes with any slide, feature or coordinate."""
    return digest_set(digest_each(files))


def digest_set(digests: Mapping[str, str]) -> str:
    """Fingerprint of a set of bags, from slide id -> digest of each."""
    return sha256_bytes(*(f"{slide}:{digests[slide]}\n".encode() for slide in sorted(digests)))


def _say_twins(digests: Mapping[str, str], cases: Mapping[str, str]) -> None:
    """Log slides of two patients whose bags are the same."""
    first: dict[str, str] = {}
    twins = []
    for slide, digest in digests.items():
        other = first.setdefault(digest, slide)
        if cases.get(slide) != cases.get(other):
            twins.append(f"{other} ({cases[other]}) and {slide} ({cases[slide]})")
    if twins:
        more = f", and {len(twins) - 1} more pairs" if len(twins) > 1 else ""
        line = "bags: %s have the same features and tiles%s: one slide under two patients?"
        logger.warning(line, twins[0], more)
