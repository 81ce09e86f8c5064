"""Each slide's stain statistics, measured once in every worker from the same few of its tiles.

The sample follows from the slide's coordinates alone, so that any worker, shard or machine measures
the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from patch_encoder.slides import RegionError
from patch_encoder.stain.macenko import StainProfile
from patch_encoder.stain.normaliser import Normaliser, Statistics, convert_to_tensor, thin_pixels
from patch_encoder.tiles.coordinates import Coordinates

logger = logging.getLogger(__name__)
SAMPLE, GRID = 64, 64
"""Tiles a slide, and pixels a side of each: about a quarter of a million pixels."""


class MeasuredStain(NamedTuple):
    """A slide's statistics, and how many tiles they are of."""

    statistics: Statistics
    tiles: int


class SlideStains:
    """Normalises tiles of many slides; with scope=slide it keeps what it measured.

    Args:
        normaliser: the option.
        coordinates: of each slide.
        read: (index of the slide, number of the tile) -> its pixels.
    """

    def __init__(
        self,
        normaliser: Normaliser,
        coordinates: Sequence[Coordinates],
        read: Callable[[int, int], np.ndarray],
    ) -> None:
        self.normaliser, self.coordinates, self.read = normaliser, coordinates, read
        self._measured: dict[int, MeasuredStain] = {}

    def __call__(
        self, tile: UInt8[np.ndarray, "h w 3"], slide: int, number: int
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Normalise tile `number` of a slide; it stays as it is where too little is stained."""
        if self.normaliser.scope == "tile":
            return self.normaliser.apply(tile)
        if slide not in self._measured:
            self._measured[slide] = self.measure(slide)
        statistics, tiles = self._measured[slide]
        if number == 0:  # one worker has this tile: said once
            self._warn(self.coordinates[slide].geometry.name, statistics, tiles)
        return self.normaliser.apply(tile, statistics)

    def measure(self, slide: int) -> MeasuredStain:
        """Statistics of up to SAMPLE tiles; up to SAMPLE unreadable ones are passed over."""
        pixels: list[torch.Tensor] = []
        for number in sample_tiles(self.coordinates[slide])[: 2 * SAMPLE]:
            if len(pixels) == SAMPLE:
                break
            try:
                pixels.append(
                    thin_pixels(convert_to_tensor(self.read(slide, int(number))), GRID).flatten(1)
                )
            except RegionError:
                continue
        glass = torch.full((3, 1), 255, dtype=torch.uint8)
        return MeasuredStain(
            self.normaliser.fit(torch.cat(pixels or [glass], 1).unsqueeze(1)), len(pixels)
        )

    def _warn(self, slide_id: str, statistics: Statistics, tiles: int) -> None:
        kind = self.normaliser.kind
        if not bool(statistics.present.any()):
            found = f"too little stained tissue in {tiles} sampled tiles"
            logger.warning(
                "extract_features: slide %s: stain=%s: %s, left as it is", slide_id, kind, found
            )
        elif isinstance(statistics, StainProfile) and not bool(statistics.present.all()):
            name = "haematoxylin" if bool(statistics.present[0, 0]) else "eosin"
            logger.warning(
                "extract_features: slide %s: stain=%s: found %s alone", slide_id, kind, name
            )


def sample_tiles(coordinates: Coordinates) -> np.ndarray:
    """All tile numbers in an order that the coordinates decide: any start is a fair sample."""
    return np.random.default_rng(int(coordinates.digest()[:16], 16)).permutation(
        len(coordinates.coords)
    )
