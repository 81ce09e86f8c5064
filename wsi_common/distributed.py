"""Processes started by torchrun: set-up (nccl on GPUs, gloo on CPUs), reductions, and one process
as the plain case.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wsi_common.device import pick_device
from wsi_common.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def init_distributed(device: str) -> World:
    """Join the group that torchrun announces in the environment; without torchrun: one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, pick_device(device))
    chosen = pick_device(device, local_rank=int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, chosen)


def require_one_process(script: str, instead: str) -> None:
    """Refuse torchrun with several processes for a script that shares its work out by itself.

    Args:
        script: its name.
        instead: how it is started on several devices or machines.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise UserError(
            f"{script}: expected one process, found {size} of torchrun; start it without torchrun, "
            f"{instead}"
        )


def local_processes() -> int:
    """Processes of torchrun on this machine; without it one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_mean(value: torch.Tensor) -> torch.Tensor:
    """Mean over processes, same shape; the tensor itself with one process."""
    if not dist.is_initialized():
        return value
    return all_reduce_sum(value) / dist.get_world_size()


def mean_with_gradient(value: torch.Tensor) -> torch.Tensor:
    """Mean over processes, whose gradient is that of this process's value: DistributedDataParallel
    takes the mean of the gradients.
    """
    if not dist.is_initialized():
        return value
    return value + (all_reduce_mean(value.detach()) - value.detach())


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over processes, same shape; the tensor itself with one process."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def all_reduce_max(value: torch.Tensor) -> torch.Tensor:
    """Largest value over processes, element by element; the tensor itself with one process."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def mean_number(value: float, device: torch.device) -> float:
    """Mean over processes of a number that is known on the host; no transfer with one process."""
    if not dist.is_initialized():
        return value
    return all_reduce_mean(torch.tensor(value, device=device)).item()


def mean_dict(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Mean over processes of named scalars, in one reduction."""
    names = sorted(values)
    stacked = all_reduce_mean(torch.stack([values[name].detach().float() for name in names]))
    return dict(zip(names, stacked.tolist(), strict=True))


def gather_objects(value: object) -> list[object]:
    """The value of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class _GatherRows(torch.autograd.Function):
    """See `gather_rows`."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor) -> torch.Tensor:
        context.share = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        start = dist.get_rank() * context.share
        return gradient[start : start + context.share] * dist.get_world_size()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order, for a loss over the whole batch that every process
    computes alike.

    The gradient reaches this process's rows, times the number of processes: DistributedDataParallel
    averages over processes what has to be added here. All processes give equally many rows.
    """
    if not dist.is_initialized():
        return rows
    return _GatherRows.apply(rows.contiguous())


def share_batch(batch_size: int, processes: int, accumulate: int = 1) -> int:
    """Compute how many items of a batch one process takes at a time.

    Args:
        batch_size: items per optimiser step over all processes.
        processes: how many there are.
        accumulate: parts that a process computes its items in, one after the other.

    Raises:
        UserError: the items cannot be shared out evenly.
    """
    if accumulate < 1 or batch_size % (processes * accumulate):
        raise UserError(
            f"batch_size={batch_size}: expected a multiple of the {processes} processes"
            + f" times accumulate={accumulate}" * (accumulate != 1)
        )
    return batch_size // (processes * accumulate)


def wrap(model: nn.Module, world: World) -> nn.Module:
    """DistributedDataParallel with more than one process, the model itself with one."""
    if world.size == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[world.device] if world.device.type == "cuda" else None
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or torch.compile."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)
