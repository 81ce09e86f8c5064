"""Several slides of a patient as one bag: their tiles one slide after the other, each slide on a
part of the plane that is its own.

Slides are laid side by side in the order in which they are given, with at least GAP cells without a
tile between them and at a distance that is a multiple of GAP cells. A model that looks at places up
to GAP cells away (DeformMIL, which learns how far), or pools 2 x 2 cells up to six times, never
mixes two slides then. All slides get the tile distance of the first one. Features stay where they
are, in memory or on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patch_encoder.bags.bag import Bag, open_bag, slide_grid
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes

# what a model predicts: a slide; a patient's slides as one bag; each slide, whose predictions are
# averaged, or of which the highest counts
POOLED = ("case_mean", "case_max")
UNITS = ("slide", "case", *POOLED)
GAP = 64  # cells


@dataclass(frozen=True, eq=False)
class CaseBag(Bag):
    """The bags of a patient's slides as one.

    Attributes:
        parts: the bags, in order.
    """

    parts: tuple[Bag, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def read(self) -> Float[Tensor, "n d"]:
        return torch.cat([part.read().to(self._type) for part in self.parts])

    def rows(self, index: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
        result, start = torch.empty(len(index), self.shape[1], dtype=self._type), 0
        for part in self.parts:
            here = (index >= start) & (index < start + len(part))
            result[here] = part.rows(index[here] - start).to(self._type)
            start += len(part)
        return result

    def blocks(self, tiles: int = 0) -> Iterator[Float[Tensor, "_ d"]]:
        for part in self.parts:
            yield from (block.to(self._type) for block in part.blocks(tiles))

    def load(self) -> Bag:
        """The same bag with every part in memory."""
        return replace(self, parts=tuple(part.load() for part in self.parts))

    def digest(self) -> str:
        return sha256_bytes(*(part.digest().encode() for part in self.parts))

    @property
    def _type(self) -> torch.dtype:
        return torch.float16 if self.dtype == "float16" else torch.float32


def join_bags(name: str, bags: Sequence[Bag]) -> Bag:
    """The bags of a case as one; a single bag stays what it is.

    Args:
        name: the case.
        bags: of its slides, all of one width.

    Raises:
        UserError: bags of several widths.
    """
    if len(bags) == 1:
        return bags[0]
    first = bags[0]
    for bag in bags:
        if bag.shape[1] != first.shape[1]:
            raise UserError(
                f"case {name}: expected {first.shape[1]} features per tile in all of its slides, "
                f"found {bag.shape[1]} in {bag.path}; use one encoder"
            )
    half = all(bag.dtype == "float16" for bag in bags)
    shape = (sum(len(bag) for bag in bags), first.shape[1])
    described = {"provenance": without_digest(first), "tiling": first.tiling}
    joined = CaseBag(Path(name), shape, "float16" if half else "float32", None, **described)
    return replace(joined, coords=lay_side_by_side(bags), parts=tuple(bags))


class CaseSlide(NamedTuple):
    """A slide and its files; no bag: it is not there."""

    slide_id: str
    bag: Path | None
    coords: Path | None = None


@dataclass(frozen=True)
class SlideInCase:
    """A slide's bag within the bag that a model sees.

    Attributes:
        own: the slide's bag.
        whole: that of all slides of its case, or the slide's own.
        rows: of `whole` that are the slide's.
        parts: slide id -> bag, of all slides in `whole`.
    """

    own: Bag
    whole: Bag
    rows: slice
    parts: dict[str, Bag]

    def check_finite(self) -> None:
        """Refuse NaN and infinity; names the bag that has them."""
        for bag in self.parts.values():
            bag.check_finite()


def open_in_case(slide: CaseSlide, case: Sequence[CaseSlide] = ()) -> SlideInCase:
    """Open a slide's bag within that of its case.

    Args:
        slide: the slide.
        case: all slides that the model sees as one bag, in its order; empty: the slide alone.

    Raises:
        UserError: a bag that cannot be read, or a slide of the case without one.
    """
    parts = {}
    for one in case or (slide,):
        if one.bag is None:
            raise UserError(
                f"slide {slide.slide_id}: expected the bags of all {len(case)} slides of its case, "
                f"which were predicted as one, found none of slide {one.slide_id}; add it to "
                "features="
            )
        parts[one.slide_id] = open_bag(one.bag, one.coords)
    own = parts[slide.slide_id]
    names = list(parts)
    start = sum(len(parts[name]) for name in names[: names.index(slide.slide_id)])
    whole = join_bags(slide.slide_id, list(parts.values()))
    return SlideInCase(own, whole, slice(start, start + len(own)), parts)


def without_digest(bag: Bag) -> dict[str, object]:
    """What a bag says of its encoder, without the digest of its content."""
    return {key: value for key, value in bag.provenance.items() if key != "sha256"}


def lay_side_by_side(bags: Sequence[Bag]) -> Int[Tensor, "n 2"] | None:
    """Corners of the tiles of all bags, in the first one's pixels; None where a bag has none."""
    grids = [slide_grid(bag) for bag in bags]
    if any(grid is None for grid in grids):
        return None
    step, left, placed = grids[0].step, 0, []
    for bag, grid in zip(bags, grids, strict=True):
        assert bag.coords is not None and grid is not None
        corners = bag.coords.double() - torch.tensor(grid.origin, dtype=torch.float64)
        cells = corners / grid.step
        shift = torch.tensor([left * GAP, 0], dtype=torch.float64)
        placed.append(((cells + shift) * step).round().to(torch.int64))
        left += math.ceil((float(cells[:, 0].max()) + 1) / GAP) + 1
    return torch.cat(placed)
