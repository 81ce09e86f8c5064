"""The vectors of all regions of a cohort, read from the bags of `extract_regions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from patch_encoder.bags.bag import open_bag
from patch_encoder.bags.paths import list_bags
from patch_encoder.cohort.labels import SlideRecord
from wsi_common.errors import UserError


@dataclass(frozen=True, eq=False)
class RegionVectors:
    """M regions of N slides, slide by slide.

    Attributes:
        slides: slide ids, sorted.
        counts: (N,) regions of each slide.
        vectors: (M, W) float32.
        corners: (M, 2) level-0 corners (x, y).
        sides: side of a region in level-0 pixels, of each slide.
        labels, cases: label and patient of each slide; an empty text and the slide id where
            labels.csv does not name it.
        encoder: that made the vectors; empty where the bags do not say.
    """

    slides: list[str]
    counts: Int64[np.ndarray, " n"]
    vectors: Float[Tensor, "m w"]
    corners: Int64[np.ndarray, "m 2"]
    sides: list[int]
    labels: list[str]
    cases: list[str]
    encoder: str

    @cached_property
    def starts(self) -> Int64[np.ndarray, " n"]:
        """Number of the first region of each slide."""
        return np.cumsum(self.counts) - self.counts

    def regions(self, slide: int) -> slice:
        """The numbers of a slide's regions."""
        return slice(int(self.starts[slide]), int(self.starts[slide] + self.counts[slide]))


def read_region_vectors(
    folder: str | Path, records: Mapping[str, SlideRecord] | None = None
) -> RegionVectors:
    """Read the bags of a folder; with `records`, those of labelled slides only.

    Raises:
        UserError: no bags, one that cannot be read or placed, or one of another width.
    """
    files = list_bags(folder)
    names = [name for name in sorted(files) if records is None or name in records]
    if not names:
        raise UserError(
            f"features={folder}: expected bags of slides in labels.csv, found none among "
            f"{len(files)}; give the labels of this cohort"
        )
    vectors, corners, sides, encoder = [], [], [], ""
    for name in names:
        bag = open_bag(files[name])
        bag.check_finite()
        rows, places = bag.read().float(), bag.coordinates()
        if vectors and rows.shape[1] != vectors[0].shape[1]:
            raise UserError(
                f"{bag.path}: expected vectors of width {vectors[0].shape[1]} as in the other "
                f"bags, found {rows.shape[1]}; extract the slide again"
            )
        vectors.append(rows)
        corners.append(places.coords)
        sides.append(places.geometry.patch_size_level0)
        encoder = str(bag.provenance.get("encoder", ""))
    known = records or {}
    return RegionVectors(
        names,
        np.array([len(rows) for rows in vectors]),
        torch.cat(vectors),
        np.concatenate(corners),
        sides,
        [known[name].label if name in known else "" for name in names],
        [known[name].case_id if name in known else name for name in names],
        encoder,
    )
