"""Batches of graded patches in the order of an epoch, read ahead by workers where that helps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from detection_kd.graded_patches.patch_augmentation import Draws
from detection_kd.graded_patches.patch_pixels import PatchPixels
from wsi_common.batch_loader import load_ahead, share_epoch
from wsi_common.distributed import World, share_batch


@dataclass(frozen=True)
class PatchBatch:
    """Patches with their grades.

    Attributes:
        pixels: uint8 (B, 3, S, S), at the teacher's resolution.
        labels: int64 (B,), index of the grade.
        draws: whose random numbers the batch is augmented with.
    """

    pixels: UInt8[Tensor, "b 3 s s"]
    labels: Int64[Tensor, " b"]
    draws: Draws

    def to(self, device: torch.device) -> PatchBatch:
        """The batch with pixels and labels on a device."""
        pixels = self.pixels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, labels=self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> PatchBatch:
        """The batch with its pixels in page-locked memory, for DataLoader."""
        return replace(self, pixels=self.pixels.pin_memory())


class _PatchReader(Dataset[PatchBatch]):
    """Item: a whole batch."""

    def __init__(self, pixels: PatchPixels, draws: Draws, size: int) -> None:
        self.pixels, self.draws, self.size = pixels, draws, size
        self.labels = pixels.patches.labels

    def __len__(self) -> int:
        return -(-len(self.draws.samples) // self.size)

    def __getitem__(self, step: int) -> PatchBatch:
        rows = slice(step * self.size, (step + 1) * self.size)
        samples = self.draws.samples[rows]
        draws = self.draws._replace(samples=samples, repeats=self.draws.repeats[rows])
        return PatchBatch(self.pixels.read(samples), torch.from_numpy(self.labels[samples]), draws)


def make_patch_loader(
    pixels: PatchPixels,
    indices: Sequence[int] | Int64[np.ndarray, " m"],
    batch_size: int,
    world: World,
    *,
    workers: int = 0,
    seed: int = 0,
    epoch: int = 0,
) -> Iterable[PatchBatch]:
    """Load this process's batches of an epoch, in its order.

    Args:
        pixels: of the set.
        indices: patches of the epoch over all processes, as from `balance_epoch`.
        batch_size: patches per optimiser step over all processes; the last batch may be smaller.
        world: this process.
        workers: processes that read ahead; none are started for a set in memory.
        seed, epoch: of the run, for the augmentation.
    """
    draws = Draws(*share_epoch(indices, world), seed, epoch)
    own = _PatchReader(pixels, draws, share_batch(batch_size, world.size))
    return load_ahead(
        own, world, workers=0 if pixels.in_memory else workers, seed=seed, epoch=epoch
    )
