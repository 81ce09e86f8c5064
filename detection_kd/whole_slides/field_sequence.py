"""Tiles of slides and fields in the colours that a localiser was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from detection_kd.fields.stain import FieldColours, FieldStain, SourceStain, measure_field
from detection_kd.whole_slides.tile_pass import to_tensor
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.slides import Slide
from patch_encoder.tiles.coordinates import SlideJob
from patch_encoder.tiles.grid import make_tile_geometry, read_tile


class FieldSequence(TileSequence):
    """The tiles of all slides, with the colours of a field stain where there is one.

    Args:
        jobs: the slides.
        stain: None: tiles keep their colours.
        side, mpp: of the tiles that the localiser was trained on, px and um per px.
    """

    def __init__(
        self, jobs: Sequence[SlideJob], stain: FieldStain | None, side: int, mpp: float
    ) -> None:
        super().__init__(jobs, to_tensor)
        if stain is not None:
            self.stains = SlideColours(stain, side, mpp, self._slide)


class SlideColours:
    """The stain map of slides that are measured when their first tile is read: on the tiles that a
    training measures them on, whatever the tiles in which mitoses are looked for.
    """

    def __init__(
        self, stain: FieldStain, side: int, mpp: float, open_job: Callable[[int], Slide]
    ) -> None:
        self.stain, self.side, self.mpp, self._open = stain, side, mpp, open_job
        self._sources: dict[int, SourceStain | None] = {}

    def __call__(
        self, tile: UInt8[np.ndarray, "s s 3"], slide: int, number: int
    ) -> UInt8[np.ndarray, "s s 3"]:
        """A tile of a slide with the target's colours, or as it is where it has no tissue."""
        if self.stain.scope == "tile":
            return FieldColours(self.stain)(tile, slide)
        if slide not in self._sources:
            self._sources[slide] = self._measure(self._open(slide))
        return FieldColours(self.stain, (self._sources[slide],))(tile, 0)

    def _measure(self, slide: Slide) -> SourceStain | None:
        geometry = make_tile_geometry(slide, self.side, self.mpp)
        return measure_field(
            self.stain, geometry, lambda corner: read_tile(slide, geometry, *corner), slide.slide_id
        )
