"""A cohort's feature bags in memory, checked before any training starts.

Bags are held as float32 on the CPU: N x D x 4 bytes a slide (10,000 tiles of 1,024 features: 40 MB).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import sha256_bytes
from patch_encoder.bags import bag_digest, bag_files, read_bag

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bags:
    """Bags of one encoder, by slide id.

    Attributes:
        features: (N, D) float32 each.
        coords: (N, 2) int64 level-0 corners each, None where the file has none.
        attributes: attributes of each file: tile geometry and provenance.
        dim: D.
    """

    features: dict[str, Tensor]
    coords: dict[str, Tensor | None]
    attributes: dict[str, dict[str, Any]]
    dim: int


def find_bags(folder: str | Path, slide_ids: Sequence[str], *, skip_missing: bool = False) -> dict[str, Path]:
    """Bag file of every slide, in the order of `slide_ids`.

    Raises:
        UserError: slides without a bag, all of them in one line, unless `skip_missing`, which logs the line.
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


def load_bags(files: Mapping[str, Path]) -> Bags:
    """Read all bags.

    Raises:
        UserError: a bag that `read_bag` refuses (NaN, infinite, empty, unreadable), or one of another width.
    """
    bags = Bags({}, {}, {}, 0)
    widths: dict[int, str] = {}
    for slide, path in files.items():
        bag = read_bag(path)
        widths.setdefault(bag.features.shape[1], slide)
        if len(widths) > 1:
            (first, example), (other, odd) = list(widths.items())[:2]
            raise UserError(f"{path}: expected {first} features as in slide {example}, found {other} in {odd}; use one encoder")
        bags.features[slide] = torch.from_numpy(bag.features)
        bags.coords[slide] = None if bag.coords is None else torch.from_numpy(bag.coords)
        bags.attributes[slide] = bag.attributes
    return Bags(bags.features, bags.coords, bags.attributes, next(iter(widths)))


def bags_digest(files: Mapping[str, Path]) -> str:
    """Fingerprint of a set of bags: changes with any slide, feature or coordinate."""
    return sha256_bytes(*(f"{slide}:{bag_digest(path)}\n".encode() for slide, path in sorted(files.items())))
