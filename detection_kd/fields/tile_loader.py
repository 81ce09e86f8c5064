"""Batches of tiles of fields, read ahead by workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from detection_kd.fields.field_tiles import FieldTiles
from wsi_common.batch_loader import load_ahead, share_epoch
from wsi_common.distributed import World, share_batch


@dataclass(frozen=True)
class FieldBatch:
    """Tiles with their mitoses.

    Attributes:
        pixels: uint8 (B, 3, S, S).
        points: per tile float32 (M, 2), (x, y) of its mitoses, px of the tile.
        labels: int64 (B,), as in `FieldTiles`.
        weights: float32 (B,), of each tile in a loss.
        samples: int64 (B,), numbers of the tiles in their `FieldTiles`.
        repeats: int64 (B,), how often each tile came before in the epoch, so that it is augmented
            in another way each time.
        redrawn: how many of the tiles got another warp than their first draw, which would have
            pushed their only mitosis out.
    """

    pixels: UInt8[Tensor, "b 3 s s"]
    points: list[Float[Tensor, "_ 2"]]
    labels: Int64[Tensor, " b"]
    weights: Float[Tensor, " b"]
    samples: Int64[Tensor, " b"]
    repeats: Int64[Tensor, " b"]
    redrawn: int = 0

    def to(self, device: torch.device) -> FieldBatch:
        """The batch with pixels, labels and weights on a device; positions stay on the CPU."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
        )

    def pin_memory(self) -> FieldBatch:
        """The batch with its pixels in page-locked memory, for DataLoader."""
        return replace(self, pixels=self.pixels.pin_memory())


class TileBatches(Dataset[FieldBatch]):
    """Item: the whole batch of these (tile, repeat) pairs."""

    def __init__(
        self,
        tiles: FieldTiles,
        indices: Int64[np.ndarray, " k"],
        repeats: Int64[np.ndarray, " k"],
        size: int,
    ) -> None:
        self.tiles, self.indices, self.repeats, self.size = tiles, indices, repeats, size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __getitem__(self, step: int) -> FieldBatch:
        rows = slice(step * self.size, (step + 1) * self.size)
        chosen, tiles = self.indices[rows], self.tiles
        pixels = np.empty((len(chosen), tiles.side, tiles.side, 3), np.uint8)
        for row, tile in enumerate(chosen.tolist()):
            pixels[row] = tiles.read(tile)
        return FieldBatch(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            [torch.from_numpy(tiles.mitoses(tile)).float() for tile in chosen.tolist()],
            torch.from_numpy(tiles.labels[chosen]),
            torch.from_numpy(tiles.weights[chosen]),
            torch.from_numpy(chosen),
            torch.from_numpy(self.repeats[rows]),
        )


def make_tile_loader(
    tiles: FieldTiles,
    indices: Sequence[int] | Int64[np.ndarray, " m"],
    batch_size: int,
    world: World,
    *,
    workers: int = 0,
    seed: int = 0,
    epoch: int = 0,
) -> Iterable[FieldBatch]:
    """Load this process's batches of an epoch, in its order.

    Args:
        tiles: the tiles.
        indices: tiles of the epoch over all processes, as from `balance_epoch`.
        batch_size: tiles per optimiser step over all processes; the last batch may be smaller.
        world: this process.
        workers: processes that read ahead; 0: none.
        seed, epoch: of the run; they seed workers, and no pixel depends on them.
    """
    own = TileBatches(tiles, *share_epoch(indices, world), share_batch(batch_size, world.size))
    return load_ahead(own, world, workers=workers, seed=seed, epoch=epoch)
