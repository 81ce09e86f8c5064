"""The mitotic count of a slide or field: how many mitoses, per mm2, and in its hot spots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detection_kd.evaluation.hot_spot import HotSpot, find_hot_spot
from detection_kd.whole_slides.mitosis_candidates import Candidates, find_mpp
from patch_encoder.tiles.coordinates import SlideJob

COUNT_COLUMNS = ("slide_id", "case", "scanner", "mpp", "area_mm2", "mitoses", "per_mm2")


@dataclass(frozen=True)
class MitosisCount:
    """What a report says about one slide or field.

    Attributes:
        slide_id, case, scanner: of it; the latter two empty where nobody says so.
        mpp: um per level-0 px.
        area_mm2: what its tiles cover.
        threshold: least score of a mitosis.
        mitoses: candidates from the threshold on.
        hot_spots: the densest window of each area, positions in um.
        atypical: mitoses that are more probably atypical than not; None: not asked.
    """

    slide_id: str
    case: str
    scanner: str
    mpp: float
    area_mm2: float
    threshold: float
    mitoses: int
    hot_spots: tuple[HotSpot, ...]
    atypical: int | None = None

    @property
    def per_mm2(self) -> float:
        """Mitoses per mm2 of what the tiles cover."""
        return self.mitoses / self.area_mm2

    def row(self) -> dict[str, Any]:
        """The line of `counts.csv`; positions in level-0 px."""
        values = {name: getattr(self, name) for name in COUNT_COLUMNS}
        values |= {} if self.atypical is None else {"atypical": self.atypical}
        for spot in self.hot_spots:
            start = f"hot_spot_{spot.area_mm2:g}_mm2"
            x, y = (round(value / self.mpp, 1) for value in spot.centre)
            values |= {start: spot.count, f"{start}_per_mm2": spot.per_mm2}
            values |= {f"{start}_x": x, f"{start}_y": y}
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in values.items()
        }


def count_mitoses(
    job: SlideJob,
    found: Candidates,
    threshold: float,
    areas_mm2: Sequence[float],
    shape: str,
    case: str = "",
    scanner: str = "",
) -> MitosisCount:
    """Count the candidates from a threshold on, overall and in the hot spot of each area."""
    geometry, mpp = job.coordinates.geometry, find_mpp(job)
    points = found.points[found.scores >= threshold] * mpp
    extent = None
    if geometry.level0_width and geometry.level0_height:
        extent = (geometry.level0_width * mpp, geometry.level0_height * mpp)
    spots = tuple(find_hot_spot(points, area, shape, extent) for area in areas_mm2)
    area = measure_area(job) * mpp**2 / 1e6
    atypical = None if found.atypical is None else int((found.atypical > 0.5).sum())
    counted = (len(points), spots, atypical)
    return MitosisCount(job.slide_id, case, scanner, mpp, area, threshold, *counted)


def measure_area(job: SlideJob) -> int:
    """Level-0 px2 of the slide that its tiles cover, each counted once."""
    geometry = job.coordinates.geometry
    size = [geometry.level0_width or np.inf, geometry.level0_height or np.inf]
    low = job.coordinates.coords
    high = np.minimum(low + geometry.patch_size_level0, size).astype(np.int64)
    # cells between all borders of tiles; a tile covers a block of them
    edges = [np.unique(np.concatenate([low[:, axis], high[:, axis]])) for axis in (0, 1)]
    covered = np.zeros((len(edges[0]), len(edges[1])), bool)
    starts, ends = (
        [np.searchsorted(edges[axis], corner[:, axis]) for axis in (0, 1)] for corner in (low, high)
    )
    for left, top, right, bottom in zip(*starts, *ends, strict=True):
        covered[left:right, top:bottom] = True
    widths, heights = (np.append(np.diff(edge), 0) for edge in edges)
    return int(widths @ covered @ heights)
