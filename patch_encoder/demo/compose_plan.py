"""Which tiles make up which composed slide: balanced classes, few lesion tiles on a positive slide,
no tile used twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from common.errors import UserError
from patch_encoder.demo.annotated_fields import FieldTile

T = TypeVar("T")
MOST_LESIONS = 4
"""A positive slide has 1 to this many lesion tiles."""


@dataclass(frozen=True)
class ComposedSlide:
    """A slide and its tiles in reading order."""

    slide_id: str
    split: str
    positive: bool
    tiles: tuple[FieldTile, ...]

    @property
    def label(self) -> str:
        """Its label in labels.csv."""
        return "positive" if self.positive else "negative"


def compose_slides(
    split: str, tiles: list[FieldTile], slides: int, tiles_per_slide: int, seed: tuple[int, ...]
) -> list[ComposedSlide]:
    """Compose the slides of one split from its tiles; half of them, rounded down, are positive.

    Raises:
        UserError: there are too few lesion tiles or clean tiles for that many slides.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    lesions = _shuffled(rng, [tile for tile in tiles if tile.lesion])
    clean = _shuffled(rng, [tile for tile in tiles if not tile.lesion])
    _check(split, slides, tiles_per_slide, len(lesions), len(clean))
    counts = _lesion_counts(rng, slides // 2, len(lesions), tiles_per_slide) + [0] * (
        slides - slides // 2
    )
    while slides * tiles_per_slide - sum(counts) > len(clean):
        # clean tiles are short by less than the lesion tiles still unused: give one more to the
        # slide with fewest
        place = min(range(slides // 2), key=lambda slide: counts[slide])
        counts[place] += 1
    composed = []
    for number, count in enumerate(_shuffled(rng, counts), 1):
        own = [lesions.pop() for _ in range(count)] + [
            clean.pop() for _ in range(tiles_per_slide - count)
        ]
        composed.append(
            ComposedSlide(f"{split}_{number:04d}", split, count > 0, tuple(_shuffled(rng, own)))
        )
    return composed


def _shuffled(rng: np.random.Generator, items: list[T]) -> list[T]:
    return [items[int(place)] for place in rng.permutation(len(items))]


def _lesion_counts(
    rng: np.random.Generator, slides: int, lesions: int, tiles_per_slide: int
) -> list[int]:
    """1 to MOST_LESIONS for each positive slide, as drawn when there are enough, else lowered here
    and there.
    """
    counts = [
        int(count) for count in rng.integers(1, min(MOST_LESIONS, tiles_per_slide) + 1, slides)
    ]
    while sum(counts) > lesions:
        larger = [place for place, count in enumerate(counts) if count > 1]
        counts[larger[int(rng.integers(0, len(larger)))]] -= 1
    return counts


def _check(split: str, slides: int, tiles_per_slide: int, lesions: int, clean: int) -> None:
    most = _most_slides(tiles_per_slide, lesions, clean)
    if slides > most:
        raise UserError(
            f"split {split}: expected tiles for {slides} slides of {tiles_per_slide}, found "
            f"{lesions} lesion tiles and "
            f"{clean} clean ones, enough for {most}; set {split}_slides={most} or lower "
            "tiles_per_slide"
        )


def _most_slides(tiles_per_slide: int, lesions: int, clean: int) -> int:
    most = 0
    while True:
        positives = (most + 1) // 2
        usable = min(lesions, positives * min(MOST_LESIONS, tiles_per_slide))
        if positives > lesions or (most + 1) * tiles_per_slide > clean + usable:
            return most
        most += 1
