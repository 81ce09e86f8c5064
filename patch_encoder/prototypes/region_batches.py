"""The regions of each step: a new order every epoch, read one batch ahead of the computation.

The order is a function of seed and epoch, and a process takes its share of each batch: any number
of processes trains on the same batches, and a resumed run goes on with the batch that was next.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patch_encoder.regions.store import RegionStore
from wsi_common.counters import draw_uniforms
from wsi_common.distributed import World
from wsi_common.errors import UserError

ORDER = 5 << 32  # address of the draws of this file, apart from those of views and clusters


@dataclass(frozen=True)
class RegionBatch:
    """Regions of one process.

    Attributes:
        ids: numbers of the regions in the store, (B,).
        features: of their tiles, half precision; 0 where a tile is not valid.
        valid: which tiles there are.
    """

    ids: Int[np.ndarray, " b"]
    features: Float[Tensor, "b g g d"]
    valid: Bool[Tensor, "b g g"]

    def to(self, device: torch.device) -> RegionBatch:
        """The same on a device."""
        features = self.features.to(device, non_blocking=True)
        return RegionBatch(self.ids, features, self.valid.to(device, non_blocking=True))


def draw_order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " n"]:
    """The order of `count` regions in an epoch."""
    return np.argsort(draw_uniforms(seed, ORDER, epoch, np.arange(count)), kind="stable")


def choose_share(
    order: Int[np.ndarray, " n"], step: int, batch_size: int, world: World
) -> Int[np.ndarray, " b"]:
    """This process's regions of a step of an epoch; the rest of the epoch after the last whole
    batch is left out.
    """
    share = batch_size // world.size
    start = step * batch_size + world.rank * share
    return order[start : start + share]


def read_batches(
    store: RegionStore, batches: list[Int[np.ndarray, " b"]], device: torch.device
) -> Iterator[RegionBatch]:
    """Read batches of regions in the given order; the next one is read while one is used.

    Args:
        store: where regions come from.
        batches: numbers of their regions.
        device: where the batch goes.

    Raises:
        UserError: a region cannot be read, or has features that are not finite.
    """
    if not batches:
        return
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(_read, store, batches[0])
        for following in [*batches[1:], None]:
            batch = coming.result()
            if following is not None:
                coming = reader.submit(_read, store, following)
            yield batch.to(device)


def _read(store: RegionStore, ids: Int[np.ndarray, " b"]) -> RegionBatch:
    features, valid = store.fetch(ids)
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not finite.all():
        raise UserError(
            f"{store.regions.describe(int(ids[int(finite.int().argmin())]))}: expected finite "
            "features, found NaN or infinity; extract the features of this slide again and build "
            "its regions with overwrite=true"
        )
    return RegionBatch(ids, features, valid)
