"""A teacher's maps of all training patches, computed once, so that an epoch of its student costs no
forward pass of the teacher.

Source: none; AT+ runs its teacher in every step. The maps are those of the patch as it is. Where a
patch is flipped or turned, its map is turned along, which a convolutional network does nearly, not
exactly; views with other changes have no kept map.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from detection_kd.graded_patches.patch_augmentation import (
    Draws,
    PatchAugmentationKeys,
    apply_symmetries,
    draw_symmetries,
)
from detection_kd.graded_patches.patch_loader import make_patch_loader
from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.graded_patches.resolution import reduce_resolution
from detection_kd.losses.resolution_losses import GradingOutput
from detection_kd.models.low_resolution import GradingNetwork
from wsi_common.device import autocast
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.progress import progress


class TeacherMaps:
    """The last maps of every patch, in half precision.

    Args:
        teacher: frozen, on its device.
        pixels: of the training patches.
        world: this process, which keeps all maps.
        batch_size: patches at a time.
        precision: of the computation.
    """

    def __init__(
        self,
        teacher: GradingNetwork,
        pixels: PatchPixels,
        world: World,
        batch_size: int,
        precision: str,
    ) -> None:
        self.teacher = teacher
        alone = World(0, 1, world.device)
        order = np.arange(len(pixels.patches))
        batches = make_patch_loader(pixels, order, batch_size, alone)
        steps = -(-len(order) // batch_size)
        parts: list[Float16[Tensor, "b k h w"]] = []
        for batch in progress(batches, "teacher's maps", steps, "batch", enabled=world.is_main):
            view = batch.pixels.to(world.device).float() / 255
            own = reduce_resolution(view, teacher.scale.ratio)
            with torch.no_grad(), autocast(world.device, precision):
                parts.append(teacher(own).maps.half().cpu())
        self.maps = torch.cat(parts)

    def read(self, draws: Draws, keys: PatchAugmentationKeys) -> GradingOutput:
        """What the teacher says of the views that `augment_patches` makes with these draws."""
        maps = self.maps[torch.from_numpy(draws.samples)].to(self.teacher.mean.device).float()
        if keys.symmetry:
            maps = apply_symmetries(maps, draw_symmetries(draws))
        with torch.no_grad():
            return self.teacher.grade_maps(maps)


def check_kept_maps(keys: PatchAugmentationKeys, inner: bool) -> None:
    """Refuse what kept maps cannot follow.

    Args:
        keys: the augmentation.
        inner: whether maps of an earlier level are compared.

    Raises:
        UserError: more than flips and quarter turns, or such a level.
    """
    changes = {name: getattr(keys, name) for name in ("rotation", "scale", "shift", "stain")}
    changes |= {"colour": keys.colour}
    on = [f"augmentation.{name}={value:g}" for name, value in changes.items() if value]
    if inner:
        on.append("an earlier terms.level")
    if on:
        raise UserError(
            f"cache_teacher=true: expected flips and quarter turns alone, and the last maps, found "
            f"{', '.join(on)}; set these to 0 (terms.level=-1), or cache_teacher=false"
        )
