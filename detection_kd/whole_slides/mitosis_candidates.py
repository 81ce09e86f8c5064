"""Candidates for mitoses out of tiles, and put together to those of a slide.

Where tiles overlap, a candidate counts from the tile that sees it nearest to its middle, for a
network knows least at a tile's rim. Two tiles see one figure a few px apart, so that within the
tolerance of matching of that divide both keep it, and the weaker view goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor, nn

from detection_kd.evaluation.peaks import FLOOR, find_candidates, suppress_points
from detection_kd.evaluation.point_matching import RADIUS_UM
from detection_kd.models.cam import WeakLocaliser
from patch_encoder.extraction.loop import ExtractSettings
from patch_encoder.tiles.coordinates import Coordinates, SlideJob
from wsi_common.device import autocast


class Candidates(NamedTuple):
    """Positions that may be mitoses: (x, y) in level-0 px, and the probability of each; and where
    somebody asked, the probability that it is an atypical figure (NaN: no mitosis).
    """

    points: Float[np.ndarray, "n 2"]
    scores: Float[np.ndarray, " n"]
    atypical: Float[np.ndarray, " n"] | None = None


@torch.inference_mode()
def detect_candidates(
    model: WeakLocaliser,
    scale: float,
    settings: ExtractSettings,
    tiles: Tensor,
    jobs: Sequence[SlideJob],
) -> list[Candidates]:
    """Candidates in a batch of tiles uint8 (B, 3, H, W) of these slides, in level-0 px of each
    tile.

    Args:
        model: a localiser, whose maps are of logits.
        scale: factor on a tile's side that gives the resolution of the model's training.
        settings: device and precision.
        tiles: the pixels.
        jobs: slide of each tile, of known resolution.
    """
    pixels = tiles.to(settings.device, non_blocking=True).float().div_(255)
    if scale != 1.0:
        pixels = nn.functional.interpolate(
            pixels, scale_factor=scale, mode="bilinear", antialias=True
        )
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with autocast(settings.device, settings.precision):
        maps = model(pixels).maps
    side = pixels.shape[-1]
    cells, found = model.find_cells(side), []
    for probability, job in zip(maps[:, 0].float().sigmoid().cpu().numpy(), jobs, strict=True):
        geometry = job.coordinates.geometry
        level0 = cells.scale(geometry.patch_size_level0 / side)
        places, scores = find_candidates(probability, FLOOR, level0, RADIUS_UM / find_mpp(job))
        found.append(Candidates(places, scores))
    return found


def find_mpp(job: SlideJob) -> float:
    """Um per level-0 px of a slide, which has to be known (`require_mpp`)."""
    mpp = job.mpp or job.coordinates.geometry.mpp
    assert mpp, job.slide_id
    return mpp


class CandidateCollector:
    """Collects the candidates of one slide's tiles, which come in order
    (`tile_pass.TileCollector`).

    Args:
        coordinates: of the slide's tiles.
        radius: level-0 px within which one figure is found once.
    """

    def __init__(self, coordinates: Coordinates, radius: float) -> None:
        self.coordinates, self.radius = coordinates, radius
        self.middles = coordinates.coords + coordinates.geometry.patch_size_level0 / 2
        self.tree = cKDTree(self.middles)
        self.parts: list[Candidates] = []

    def add(self, found: Candidates) -> None:
        """Candidates of the next tile, in level-0 px of the tile."""
        number = len(self.parts)
        points = found.points + self.coordinates.coords[number]
        kept = self._is_central(points, number) & self._is_on_slide(points)
        self.parts.append(Candidates(points[kept], found.scores[kept]))

    def _is_central(self, points: np.ndarray, number: int) -> Bool[np.ndarray, " n"]:
        """Whether no other tile sees a point nearer to its middle, or only by the radius."""
        if not len(points):
            return np.zeros(0, bool)
        nearest = self.tree.query(points, p=np.inf)[0]
        return np.abs(points - self.middles[number]).max(1) <= nearest + 2 * self.radius

    def _is_on_slide(self, points: np.ndarray) -> Bool[np.ndarray, " n"]:
        """Whether a point lies on the slide and not in the white beyond it, where that is known."""
        geometry = self.coordinates.geometry
        size = np.array([geometry.level0_width or np.inf, geometry.level0_height or np.inf])
        return (points < size).all(1)

    def merge(self) -> Candidates:
        """The candidates of the slide in its level-0 px, by falling score."""
        points = np.concatenate([np.zeros((0, 2)), *(part.points for part in self.parts)])
        scores = np.concatenate([np.zeros(0), *(part.scores for part in self.parts)])
        kept = suppress_points(points, scores, self.radius)
        return Candidates(points[kept], scores[kept])
