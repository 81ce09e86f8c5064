"""A network with a trunk on its device, ready to be trained in one or many processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common.distributed import World, wrap
from common.errors import UserError


def place_network(model: Any, world: World, *, compile: bool) -> nn.Module:
    """Move a network to its device, and give its batch norm the statistics of all processes.

    Args:
        model: a localiser or a grader, with a `trunk` and `keys.trunk`; it is changed in place.
        world: this process.
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
                f"network.trunk={model.keys.trunk}: its batch norm needs CUDA with {world.size} "
                f"processes, found {world.device.type}; use network.trunk=small (of a localiser: "
                "with network.norm=layer), or one process"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compile:
        model.trunk.compile()
    return wrap(model, world)
