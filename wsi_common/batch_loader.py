"""Batches of an epoch in its order, read ahead by workers: what loaders of whole batches share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int64
from torch.utils.data import DataLoader, Dataset

from wsi_common.distributed import World
from wsi_common.sampling import count_repeats, share_of
from wsi_common.seed import epoch_generator, seed_worker

Batch = TypeVar("Batch")


def share_epoch(
    indices: Sequence[int] | Int64[np.ndarray, " m"], world: World
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """This process's samples of an epoch in their order, and how often each came before in the
    epoch, over all processes.

    Args:
        indices: samples of the epoch over all processes, as from `balance_epoch`.
        world: this process.
    """
    order = np.asarray(indices, np.int64)
    repeats = count_repeats(order)
    return share_of(order, world.rank, world.size), share_of(repeats, world.rank, world.size)


def load_ahead(
    batches: Dataset[Batch], world: World, *, workers: int, seed: int, epoch: int
) -> DataLoader[Batch]:
    """Read the batches one after the other.

    Args:
        batches: item k is the k-th batch of this process, whole; it has `pin_memory` for CUDA.
        world: this process.
        workers: processes that read ahead; 0: none.
        seed, epoch: of the run; they seed the workers.
    """
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=seed_worker,
        generator=epoch_generator(seed, epoch),
    )
