"""Augmentation of batches of tiles on the device, pixels and points together.

UTS flips tiles and rotates half of them by up to 90 degrees with black corners, for a teacher also
with an elastic warp; whoever loses the only mitosis in this (5 to 7 % of the positives) becomes a
negative. Differences: all eight symmetries, each tile its own; rotation shows the tile's mirror
image beyond its border; stain and colour change as well; a warp that would push the only mitosis
out is drawn again; labels stay as they were given, be they annotated or a teacher's.

Every draw follows from (seed, epoch, tile, how often the tile came before in the epoch), so that
workers, processes and resuming change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float64, UInt8
from torch import Tensor

from detection_kd.fields.tile_loader import FieldBatch
from detection_kd.fields.warps import (
    LARGEST_SCALE,
    LARGEST_SLOPE,
    Warps,
    count_lattice,
    mirror_points,
    turn_points,
    turn_tile,
)
from patch_encoder.selfdistill.photometric import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
)
from patch_encoder.stain.augment import WHITE, map_hed
from patch_encoder.stain.optical_density import recolour, round_to_pixels
from wsi_common.config import key
from wsi_common.counters import draw_uniforms
from wsi_common.errors import UserError

SYMMETRY, WARP, LATTICE, STAIN, COLOUR = range(5)  # purposes of draws
WARPED = 0.5  # share of the tiles
ATTEMPTS = 8
ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation)
TOGETHER = 8  # tiles whose colours change at a time


@dataclass
class PointAugmentationKeys:
    """How training tiles are varied; UTS: rotation=90, for its teacher also elastic=8.5."""

    symmetries: bool = key(True, "flip tiles and turn them by quarters")
    rotation: float = key(0.0, "rotate half of the tiles by up to this, degrees; 0: off")
    scale: float = key(0.0, "scale the same half by 1 -+ this; 0: off")
    elastic: float = key(0.0, "displace pixels of the same half by up to this, px; 0: off")
    elastic_spacing: float = key(
        52.0, "px over which the displacement changes; at least 6 times elastic"
    )
    stain: float = key(
        0.0, "scale and shift the stains' densities by up to this, 0.05 is mild; 0: off"
    )
    colour: float = key(0.0, "scale brightness, contrast and saturation by 1 -+ this; 0: off")

    @property
    def warps(self) -> bool:
        """Whether tiles are warped at all."""
        return bool(self.rotation or self.scale or self.elastic)

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: one of them.
        """
        if not (0 <= self.rotation <= 180 and 0 <= self.scale <= LARGEST_SCALE):
            raise UserError(
                f"augmentation: expected 0 <= rotation <= 180 and 0 <= scale <= {LARGEST_SCALE}, "
                f"found {self.rotation:g} and {self.scale:g}"
            )
        if not 0 <= self.elastic <= LARGEST_SLOPE * self.elastic_spacing:
            raise UserError(
                f"augmentation.elastic={self.elastic:g}: expected at most a sixth of "
                f"elastic_spacing={self.elastic_spacing:g}, so that no tissue is folded"
            )
        if not (0 <= self.stain < 1 and 0 <= self.colour <= 1):
            raise UserError(
                "augmentation: expected 0 <= stain < 1 and 0 <= colour <= 1, found "
                f"{self.stain:g} and {self.colour:g}"
            )


@dataclass(frozen=True)
class _Draws:
    """Uniform numbers of each tile of a batch, by purpose."""

    seed: int
    epoch: int
    samples: np.ndarray
    repeats: np.ndarray

    def draw(self, purpose: int, count: int, attempt: int = 0) -> Float64[np.ndarray, "b n"]:
        address = (self.epoch, self.samples[:, None], self.repeats[:, None], purpose, attempt)
        return draw_uniforms(self.seed, *address, np.arange(count))

    def select(self, rows: np.ndarray) -> _Draws:
        return replace(self, samples=self.samples[rows], repeats=self.repeats[rows])


@torch.no_grad()
def augment_tiles(
    batch: FieldBatch, keys: PointAugmentationKeys, seed: int, epoch: int
) -> FieldBatch:
    """A batch with its tiles varied, and the points where the pixels went.

    Points that leave their tile are dropped. A tile that is labelled positive keeps at least one
    of its mitoses; one without any known point is not warped, since nobody could tell.

    Args:
        batch: on any device; it is not changed.
        keys: what is varied.
        seed: of the run.
        epoch: how many came before.
    """
    draws = _Draws(seed, epoch, batch.samples.numpy(), batch.repeats.numpy())
    pixels, side = batch.pixels.clone(), batch.pixels.shape[-1]
    points = [part.double().numpy() for part in batch.points]
    redrawn = 0
    if keys.symmetries:
        points = _apply_symmetries(pixels, points, draws)
    if keys.warps:
        positive = (batch.labels == 1).cpu().numpy()
        points, redrawn = _apply_warps(pixels, points, positive, keys, draws, side)
    _vary_colours(pixels, keys, draws)
    return replace(
        batch,
        pixels=pixels,
        points=[torch.from_numpy(part).float() for part in points],
        redrawn=redrawn,
    )


def _apply_symmetries(
    pixels: UInt8[Tensor, "b 3 s s"], points: list[np.ndarray], draws: _Draws
) -> list[np.ndarray]:
    """Flip and turn every tile, in place; its points."""
    chosen = (8 * draws.draw(SYMMETRY, 1)[:, 0]).astype(int)
    for symmetry in np.unique(chosen).tolist():
        rows = torch.from_numpy(np.flatnonzero(chosen == symmetry)).to(pixels.device)
        pixels[rows] = turn_tile(pixels[rows], bool(symmetry & 4), symmetry & 3)
    side = pixels.shape[-1]
    return [
        turn_points(part, side, bool(symmetry & 4), symmetry & 3)
        for part, symmetry in zip(points, chosen.tolist())
    ]


def _apply_warps(
    pixels: UInt8[Tensor, "b 3 s s"],
    points: list[np.ndarray],
    positive: Bool[np.ndarray, " b"],
    keys: PointAugmentationKeys,
    draws: _Draws,
    side: int,
) -> tuple[list[np.ndarray], int]:
    """Warp half of the tiles in place; (their points, how many were drawn again)."""
    points = list(points)
    blind = positive & np.array([len(part) == 0 for part in points], bool)
    waiting = np.flatnonzero((draws.draw(WARP, 1)[:, 0] < WARPED) & ~blind)
    redrawn = 0
    for attempt in range(ATTEMPTS):
        warps = _draw_warps(keys, draws.select(waiting), side, attempt)
        lost = []
        for number, row in enumerate(waiting.tolist()):
            moved = _keep_inside(warps.move_points(number, points[row]), side)
            if positive[row] and not len(moved):
                lost.append(row)
                continue
            images = warps.move_points(number, mirror_points(points[row], side))
            points[row] = np.concatenate([moved, _keep_inside(images, side)])
            pixels[row] = warps.move_pixels(number, pixels[row])
        waiting = np.array(lost, int)
        redrawn += len(lost) if attempt == 0 else 0
    return points, redrawn


def _draw_warps(keys: PointAugmentationKeys, draws: _Draws, side: int, attempt: int) -> Warps:
    angle, scale = (2 * draws.draw(WARP, 2, attempt + 1) - 1).T
    angle, scale = np.deg2rad(keys.rotation) * angle, 1 + keys.scale * scale
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    matrices = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], -2)
    spacing = keys.elastic_spacing if keys.elastic else float(side)
    lines = count_lattice(side, spacing)
    drawn = 2 * draws.draw(LATTICE, 2 * lines**2, attempt) - 1
    lattice = keys.elastic * drawn.reshape(-1, lines, lines, 2)
    return Warps(matrices, lattice, side, spacing)


def _keep_inside(points: Float64[np.ndarray, "m 2"], side: int) -> Float64[np.ndarray, "k 2"]:
    return points[((points >= 0) & (points < side)).all(1)]


def _vary_colours(
    pixels: UInt8[Tensor, "b 3 s s"], keys: PointAugmentationKeys, draws: _Draws
) -> None:
    """Change each tile's stains, then its brightness, contrast and saturation, in place."""
    drawn = (2 * torch.from_numpy(draws.draw(STAIN, 6)) - 1).to(pixels.device)
    factors = 1 + keys.colour * (2 * torch.from_numpy(draws.draw(COLOUR, 3)) - 1)
    # a few tiles at a time, since their colours are computed as float32
    for start in range(0, len(pixels), TOGETHER):
        part = slice(start, start + TOGETHER)
        if keys.stain:
            map_ = map_hed(1 + keys.stain * drawn[part, :3], keys.stain * drawn[part, 3:])
            pixels[part] = recolour(pixels[part], *map_, light=WHITE)
        if keys.colour:
            views = pixels[part].float()
            for adjust, factor in zip(ADJUSTMENTS, factors[part].to(views).unbind(1)):
                adjust(views, factor)
            pixels[part] = round_to_pixels(views)
