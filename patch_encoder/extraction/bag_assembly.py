"""From batches of features to bags: rows are written as they come, the last one ends a bag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import numpy as np

from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.bag_targets import BagTarget, Writer
from patch_encoder.extraction.tile_batches import BadTile, TileBatch
from patch_encoder.slides.names import compute_slide_identity
from patch_encoder.tiles.coordinates import SlideJob

UNREADABLE = "unreadable_tiles"  # attribute of `features` in a bag that lacks some


@dataclass
class _Slide:
    """A slide some of whose tiles have come."""

    missing: int
    writer: Writer | None = None
    bad: list[BadTile] = field(default_factory=list)
    not_finite: int = 0
    given_up: str = ""


class Assembly:
    """Collects features slide by slide; tiles of a slide come in order.

    Args:
        jobs: the slides, in the order of `TileBatch.slides`.
        provenance: of each job's bag.
        target: where the bags go.
        max_bad_tiles: largest share of a slide's tiles that may be unreadable; a slide with more of
            them fails.
        failures: gets the slides that fail.
        late: what joins the provenance only when a bag ends, since the first batch decides it.
    """

    def __init__(
        self,
        jobs: Sequence[SlideJob],
        provenance: Sequence[Mapping[str, str]],
        target: BagTarget,
        failures: Failures,
        *,
        max_bad_tiles: float,
        late: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.late = late
        self.jobs, self.provenance, self.target, self.failures = jobs, provenance, target, failures
        self.max_bad_tiles = max_bad_tiles
        self._slides: dict[int, _Slide] = {}

    def take(self, batch: TileBatch, features: np.ndarray) -> None:
        """Enter one batch: features (B, D) of the tiles that could be read."""
        owners = batch.slides.numpy()
        for index, count in batch.counted:
            slide = self._slides.setdefault(index, _Slide(len(self.jobs[index].coordinates.coords)))
            slide.missing -= count
            bad = [bad for bad in batch.failures if bad.slide == index]
            slide.bad += bad
            slide.given_up = slide.given_up or next(
                (tile.error for tile in bad if tile.given_up), ""
            )
            self._append(index, slide, features[owners == index])
            if slide.missing == 0:
                self._finish(index, self._slides.pop(index))

    def close(self) -> None:
        """Leave nothing of slides that are not finished."""
        with ExitStack() as stack:  # all of them, even when a signal interrupts one
            for slide in self._slides.values():
                stack.callback(_discard, slide)
        self._slides.clear()

    def _append(self, index: int, slide: _Slide, rows: np.ndarray) -> None:
        slide.not_finite += int((~np.isfinite(rows).all(axis=1)).sum()) if len(rows) else 0
        if slide.given_up or slide.not_finite or self._too_many(index, slide):
            _discard(slide)
        elif len(rows):
            if slide.writer is None:
                job = self.jobs[index]
                shape = (len(job.coordinates.coords), rows.shape[1])
                slide.writer = self.target.open(job.slide_id, shape)
            slide.writer.append(rows)

    def _too_many(self, index: int, slide: _Slide) -> bool:
        return len(slide.bad) > self.max_bad_tiles * len(self.jobs[index].coordinates.coords)

    def _finish(self, index: int, slide: _Slide) -> None:
        job = self.jobs[index]
        corners = job.coordinates.coords
        missing = f"{len(slide.bad)} of {len(corners)} tiles cannot be read"
        if slide.given_up:
            self.failures.add(job.slide_id, slide.given_up)
            return
        if self._too_many(index, slide) or len(slide.bad) == len(corners):
            reason = (
                f"{missing} (max_bad_tiles={self.max_bad_tiles:g}), the first: {slide.bad[0].error}"
            )
            self.failures.add(job.slide_id, reason)
            return
        if slide.not_finite:
            name = self.provenance[index]["encoder"]
            self.failures.add(
                job.slide_id,
                f"{name} gave NaN or infinity for {slide.not_finite} of {len(corners)} tiles",
            )
            return
        assert slide.writer is not None
        try:
            provenance: dict[str, object] = {
                **self.provenance[index],
                **self.late(),
                **compute_slide_identity(job.path),
            }
        except OSError as error:
            _discard(slide)
            self.failures.add(job.slide_id, f"slide {job.path}: was read, and then: {error}")
            return
        if slide.bad:
            self.failures.note(
                job.slide_id, f"{missing}, the bag is without them; the first: {slide.bad[0].error}"
            )
            corners = np.delete(corners, [bad.tile for bad in slide.bad], axis=0)
            provenance[UNREADABLE] = len(slide.bad)
        try:
            slide.writer.finish(corners, asdict(job.coordinates.geometry), provenance)
        finally:
            _discard(slide)


def _discard(slide: _Slide) -> None:
    if slide.writer is not None:
        slide.writer.discard()
        slide.writer = None
