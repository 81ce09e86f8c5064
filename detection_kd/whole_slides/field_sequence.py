"""Tiles of slides and fields in the colours that a localiser was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from detection_kd.fields.stain import FieldColours, FieldStain, SourceStain, sample_pixels
from detection_kd.whole_slides.tile_pass import to_tensor
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.slides import Slide
from patch_encoder.tiles.coordinates import SlideJob, TileGeometry
from patch_encoder.tiles.grid import read_tile


class FieldSequence(TileSequence):
    """The tiles of all slides, with the colours of a field stain where there is one."""

    def __init__(self, jobs: Sequence[SlideJob], stain: FieldStain | None) -> None:
        super().__init__(jobs, to_tensor)
        if stain is not None:
            self.stains = SlideColours(jobs, stain, self._slide)


class SlideColours:
    """The stain map of slides that are measured when their first tile is read.

    Attributes:
        geometries, side, read_plain: of the slides' tiles, as `sample_pixels` asks for them.
    """

    def __init__(
        self, jobs: Sequence[SlideJob], stain: FieldStain, open_job: Callable[[int], Slide]
    ) -> None:
        self.stain, self._open = stain, open_job
        self.geometries: list[TileGeometry] = [job.coordinates.geometry for job in jobs]
        self.side = self.geometries[0].target_size if jobs else 0
        self._sources: dict[int, SourceStain | None] = {}

    def __call__(
        self, tile: UInt8[np.ndarray, "s s 3"], slide: int, number: int
    ) -> UInt8[np.ndarray, "s s 3"]:
        """A tile of a slide with the target's colours, or as it is where it has no tissue."""
        if self.stain.scope == "tile":
            return FieldColours(self.stain)(tile, slide)
        if slide not in self._sources:
            pixels = sample_pixels(self, slide)
            self._sources[slide] = None if pixels is None else self.stain.fit(pixels)
        return FieldColours(self.stain, (self._sources[slide],))(tile, 0)

    def read_plain(
        self, number: int, corner: np.ndarray | Sequence[int]
    ) -> UInt8[np.ndarray, "s s 3"]:
        """A tile of slide `number` anywhere, in its own colours."""
        x, y = map(int, corner)
        return read_tile(self._open(number), self.geometries[number], x, y)
