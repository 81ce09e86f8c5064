"""What networks that localise and that grade have in common: a trunk whose weights want pixels of
certain statistics, and the way into a training.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.models.encoder_table import IMAGENET, Statistics
from patch_encoder.selfdistill.backbone import find_initial_row
from wsi_common.distributed import World, wrap
from wsi_common.errors import UserError


class NormalisedNetwork(nn.Module):
    """A network that normalises its pixels itself.

    Attributes:
        trunk: all that is worth compiling.
        statistics: mean and standard deviation per channel, of pixels 0..1.
    """

    trunk: nn.Module
    statistics: Statistics

    def set_statistics(self, statistics: Any) -> None:
        """Mean and standard deviation per channel that pixels are normalised with."""
        self.statistics = tuple(tuple(float(value) for value in values) for values in statistics)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in self.statistics)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def normalise(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels 0..1 as the trunk wants them."""
        return (pixels - self.mean) / self.std


def find_statistics(network: Any, init: str) -> Statistics:
    """Mean and standard deviation per channel that a trunk's weights were trained with.

    Args:
        network: of timm.
        init: where its weights come from; an encoder's row knows better than timm.
    """
    row, config = find_initial_row(init), network.pretrained_cfg
    own = (tuple(config.get("mean") or ()), tuple(config.get("std") or ()))
    if row is not None:
        return row.statistics
    return own if all(own) else IMAGENET


def place_network(
    model: NormalisedNetwork, world: World, trunk: str, *, compile: bool
) -> nn.Module:
    """Move a network to its device and make it ready for training in one or many processes.

    Args:
        model: it is changed in place.
        world: this process.
        trunk: its name, for errors.
        compile: whether the trunk is compiled.

    Raises:
        UserError: batch norm in several processes without CUDA.
    """
    model = model.to(world.device, memory_format=torch.channels_last)
    if world.size > 1 and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
    ):
        if world.device.type != "cuda":
            raise UserError(
                f"network.trunk={trunk}: its batch norm needs CUDA with {world.size} processes, "
                f"found {world.device.type}; use network.trunk=small "
                "network.norm=layer network.init=random, or one process"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compile:
        model.trunk.compile()
    return wrap(model, world)
