"""Augmentation of graded patches in batches on the device, before the student's pixels are made, so
that teacher and student see one view.

Source: AT+ (dataset.py): a flip, rotation by 45 degrees, scale .95 to 1.2, a shift of 5 % and
colour by .1, each for half of the patches, black where the rotated picture ends. Differences: all
eight symmetries, since a slide has no up or down; every patch is drawn anew in each epoch; what a
rotation uncovers is the patch mirrored; densities of the stains may vary. Every draw is a function
of (seed, epoch, patch, repeat) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from patch_encoder.stain.augment import WHITE, map_hed
from patch_encoder.stain.optical_density import recolour
from wsi_common.config import key
from wsi_common.counters import draw_uniforms
from wsi_common.errors import UserError

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
SYMMETRY, PLACE, STAIN, COLOUR = range(4)  # purposes, so that no two draws are the same number


@dataclass
class PatchAugmentationKeys:
    """Keys of the augmentation of graded patches."""

    symmetry: bool = key(True, "flip, and rotate by quarter turns")
    rotation: float = key(0.0, "then rotate by up to this, degrees", least=0)
    scale: float = key(0.0, "enlarge by a factor of 1 -+ this", least=0)
    shift: float = key(0.0, "move by up to this share of the side", least=0)
    stain: float = key(
        0.05, "scale and shift the stains' densities by up to this, 0.05 is mild; 0: off", least=0
    )
    colour: float = key(
        0.0, "scale brightness, contrast and saturation by 1 -+ this; 0: off", least=0
    )

    def check(self) -> None:
        """Raise UserError on a number that gives no picture."""
        if max(self.scale, self.shift, self.stain, self.colour) >= 1 or self.rotation > 180:
            raise UserError(
                "augmentation: expected scale, shift, stain and colour below 1 and rotation <= "
                f"180, found {self.scale:g}, {self.shift:g}, {self.stain:g}, {self.colour:g} and "
                f"{self.rotation:g}"
            )


class Draws(NamedTuple):
    """Whose random numbers are drawn: patches (B,), how often each came before in the epoch (B,),
    the run's seed, and the epoch.
    """

    samples: Int64[np.ndarray, " b"]
    repeats: Int64[np.ndarray, " b"]
    seed: int
    epoch: int

    def uniforms(self, purpose: int, count: int) -> Float[Tensor, "b k"]:
        """`count` numbers of [0, 1) for every patch, float32."""
        numbers = draw_uniforms(
            *(self.seed, self.epoch, purpose),
            *(self.samples[:, None], self.repeats[:, None], np.arange(count)[None]),
        )
        return torch.from_numpy(numbers).float()


def augment_patches(
    pixels: UInt8[Tensor, "b 3 s s"], draws: Draws, keys: PatchAugmentationKeys
) -> Float[Tensor, "b 3 s s"]:
    """A random view of every patch, 0..1, on the device of `pixels`."""
    device = pixels.device
    if keys.stain:
        pair = keys.stain * (2 * draws.uniforms(STAIN, 6).to(device) - 1)
        pixels = recolour(pixels, *map_hed(1 + pair[:, :3], pair[:, 3:]), light=WHITE)
    view = pixels.float() / 255
    if keys.colour:
        factors = 1 + keys.colour * (2 * draws.uniforms(COLOUR, 3).to(device) - 1)
        view = scale_colour(view, factors)
    if keys.rotation or keys.scale or keys.shift:
        numbers = 2 * draws.uniforms(PLACE, 4).to(device) - 1
        view = move_pixels(
            view,
            math.radians(keys.rotation) * numbers[:, 0],
            1 + keys.scale * numbers[:, 1],
            2 * keys.shift * numbers[:, 2:],
        )
    return apply_symmetries(view, draw_symmetries(draws)) if keys.symmetry else view


def draw_symmetries(draws: Draws) -> Int64[Tensor, " b"]:
    """The symmetry of every patch, 0 to 7; maps that were kept of a patch as it is follow its view
    by the same number.
    """
    return (draws.uniforms(SYMMETRY, 1)[:, 0] * 8).long()


def apply_symmetries(
    maps: Float[Tensor, "b c s s"], numbers: Int64[Tensor, " b"]
) -> Float[Tensor, "b c s s"]:
    """Flip or turn square maps: bit 0 left and right, bit 1 up and down, bit 2 along the
    diagonal.
    """
    for bit, change in enumerate(
        (lambda part: part.flip(-1), lambda part: part.flip(-2), lambda part: part.mT)
    ):
        chosen = (numbers >> bit & 1).bool().to(maps.device)
        maps = torch.where(chosen[:, None, None, None], change(maps), maps)
    return maps


def move_pixels(
    view: Float[Tensor, "b 3 s s"],
    angles: Float[Tensor, " b"],
    scales: Float[Tensor, " b"],
    shifts: Float[Tensor, "b 2"],
) -> Float[Tensor, "b 3 s s"]:
    """Rotate (radians), enlarge and shift (in half sides) around the centre; bilinear, mirrored
    beyond the border.
    """
    cosine, sine = angles.cos() / scales, angles.sin() / scales
    matrix = torch.stack([cosine, sine, -sine, cosine], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(
        torch.cat([matrix, -(matrix @ shifts[..., None])], dim=2), list(view.shape), False
    )
    return F.grid_sample(view, grid, "bilinear", "reflection", False)


def scale_colour(
    view: Float[Tensor, "b 3 s s"], factors: Float[Tensor, "b 3"]
) -> Float[Tensor, "b 3 s s"]:
    """Brightness, contrast and saturation of every patch, each times its factor, as in
    `torchvision.transforms.v2.functional`, which takes one factor per call.
    """
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    view = (view * brightness).clamp(0, 1)
    view = torch.lerp(_make_grey(view).mean((2, 3), keepdim=True), view, contrast).clamp(0, 1)
    return torch.lerp(_make_grey(view), view, saturation).clamp(0, 1)


def _make_grey(view: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 1 s s"]:
    weights = torch.tensor(GREY, device=view.device, dtype=view.dtype)
    return (view * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)
