"""Grades of a slide's tiles: at low resolution, and where asked for by the teacher as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from detection_kd.grading.two_speed import choose_least_sure
from detection_kd.models.low_resolution import GradingNetwork, PatchScale
from detection_kd.whole_slides.tile_pass import find_in_slides, to_tensor
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.loop import ExtractSettings
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.slides import open_slide
from patch_encoder.stain.optical_density import weigh_tissue
from patch_encoder.tiles.coordinates import Coordinates, SlideJob
from patch_encoder.tiles.grid import make_tile_geometry
from wsi_common.device import autocast
from wsi_common.errors import UserError

NEARLY = 0.01  # a level up to 1 % coarser counts as that many times finer, as in `choose_level`


class GradedTile(NamedTuple):
    """What a network says of one tile: probability of each grade (C,), and its share of tissue."""

    probabilities: np.ndarray
    tissue: float


@dataclass(frozen=True)
class TileGrades:
    """The tiles of one slide.

    Attributes:
        probabilities: of every grade.
        tissue: share of each tile that is no glass.
        by_teacher: tiles whose probabilities are the teacher's.
    """

    probabilities: Float[np.ndarray, "n c"]
    tissue: Float[np.ndarray, " n"]
    by_teacher: Bool[np.ndarray, " n"]


class GradeCollector:
    """Collects one slide's tiles, which come in order (`tile_pass.TileCollector`)."""

    def __init__(self) -> None:
        self.parts: list[GradedTile] = []

    def add(self, found: GradedTile) -> None:
        """The next tile."""
        self.parts.append(found)

    def merge(self) -> TileGrades:
        """All tiles."""
        probabilities = np.stack([part.probabilities for part in self.parts])
        tissue = np.array([part.tissue for part in self.parts])
        return TileGrades(probabilities, tissue, np.zeros(len(tissue), bool))


def read_at(job: SlideJob, scale: PatchScale) -> SlideJob:
    """The same places, read for a network of this resolution and reduced by `average_tile`.

    The nearest finer level is read as it is, but for what it is finer than the teacher's view, and
    averaged over whole pixels, as the student's pixels are in training.

    Raises:
        UserError: the slide cannot be read or has no such resolution, or its tiles are of another
            size.
    """
    old = job.coordinates.geometry
    with open_slide(job.path, job.mpp, old.tile_pattern) as slide:
        new = make_tile_geometry(slide, scale.own_side, scale.own_mpp, old.overlap)
        finer = min(int(new.patch_size / scale.own_side + NEARLY), scale.ratio)
        if finer > 1 and scale.own_mpp is not None:
            side, mpp = scale.own_side * finer, scale.own_mpp / finer
            new = make_tile_geometry(slide, side, mpp, old.overlap)
    if abs(new.patch_size_level0 - old.patch_size_level0) > 0.01 * old.patch_size_level0:
        raise UserError(
            f"expected tiles of {new.patch_size_level0} level-0 px, {scale.side} px at "
            f"{scale.mpp:g} um, found {old.patch_size_level0}; tile with tile_size={scale.side} "
            f"target_mpp={scale.mpp:g}"
        )
    geometry = replace(new, patch_size_level0=old.patch_size_level0, step_level0=old.step)
    return replace(job, coordinates=Coordinates(job.coordinates.coords, geometry))


def average_tile(side: int, tile: UInt8[np.ndarray, "h h 3"]) -> UInt8[Tensor, "3 {side} {side}"]:
    """A tile as `read_at` reads it -> what a network sees: the mean of whole squares of pixels."""
    finer = len(tile) // side
    return to_tensor(np.asarray(Image.fromarray(tile).reduce(finer)) if finer > 1 else tile)


@torch.inference_mode()
def grade_tiles(
    network: GradingNetwork, settings: ExtractSettings, tiles: Tensor, _: Sequence[SlideJob]
) -> list[GradedTile]:
    """Grade a batch of tiles uint8 (B, 3, H, W) at the network's own resolution."""
    moved = tiles.to(settings.device, non_blocking=True)
    pixels = (moved.float() / 255).contiguous(memory_format=torch.channels_last)
    with autocast(settings.device, settings.precision):
        logits = network(pixels).logits
    tissue = weigh_tissue(moved).mean(1).cpu().tolist()
    found = logits.double().softmax(1).cpu().numpy()
    return [GradedTile(*pair) for pair in zip(found, tissue, strict=True)]


def ask_teacher(
    teacher: GradingNetwork,
    job: SlideJob,
    found: TileGrades,
    kept: Bool[np.ndarray, " n"],
    share: float,
    settings: ExtractSettings,
    failures: Failures,
) -> TileGrades | None:
    """Let the teacher grade the tiles that were least sure.

    Args:
        teacher: at full resolution.
        job: the slide.
        found: at low resolution.
        kept: tiles with tissue, among which `share` is meant.
        share: of tiles that are graded again.
        settings: of the pass.
        failures: gets the slide if a tile cannot be read.

    Returns:
        The slide's tiles; None where one of them cannot be read.
    """
    numbers = np.flatnonzero(kept)
    numbers = numbers[choose_least_sure(found.probabilities[numbers], share)]
    if not len(numbers):
        return found
    finer = read_at(job, teacher.scale)
    part = Coordinates(finer.coordinates.coords[numbers], finer.coordinates.geometry)
    transform = partial(average_tile, teacher.scale.own_side)
    sequence = TileSequence([replace(finer, coordinates=part)], transform)
    grade = partial(grade_tiles, teacher, settings)
    for _, again in find_in_slides(sequence, grade, lambda _: GradeCollector(), settings, failures):
        probabilities = found.probabilities.copy()
        probabilities[numbers] = again.probabilities
        by_teacher = found.by_teacher.copy()
        by_teacher[numbers] = True
        return replace(found, probabilities=probabilities, by_teacher=by_teacher)
    return None
