"""What a D2VFM training reads: tiles, or the cached features of a frozen backbone, for training and
validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from detection_kd.datasets.distillation import DistillationTiles
from detection_kd.datasets.feature_cache import CachedMaps, CacheKey, cache_maps, join_batch
from detection_kd.datasets.pairs import Pair
from detection_kd.datasets.tile_augmentation import TileAugmentation
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.seed import epoch_generator, seed_worker

Parts = tuple[list[Pair], list[Pair]]  # training and validation pairs


def make_tile_sets(
    parts: Parts,
    *,
    augment: bool,
    seed: int,
    augmentation: TileAugmentation,
    teacher_view: Callable[[np.ndarray], Tensor] | None,
) -> tuple[DistillationTiles, DistillationTiles]:
    """Make the training tiles, augmented when `augment`, and the validation tiles as they are.

    Args:
        parts: training and validation pairs.
        augment, seed, augmentation, teacher_view: as for `DistillationTiles`.
    """
    options: dict[str, Any] = {"augmentation": augmentation, "teacher_view": teacher_view}
    train = DistillationTiles(parts[0], augment=augment, seed=seed, **options)
    return train, DistillationTiles(parts[1], augment=False, seed=seed)


def make_cached_sets(
    pairs: list[Pair],
    parts: Parts,
    folder: Path,
    key: CacheKey,
    frozen: nn.Module,
    stages: Sequence[int],
    world: World,
    *,
    turns: int,
    seed: int,
    workers: int,
) -> tuple[CachedMaps, CachedMaps]:
    """Compute or find the features of the frozen backbone: training pairs in all quarter turns, and
    validation pairs as they are. All runs on this distillation set share the files.

    Args:
        pairs: the whole distillation set.
        parts: its training and its validation pairs.
        folder, key, frozen, stages, world, workers: as for `cache_maps`.
        turns: how many quarter turns of a training tile are cached.
        seed: seed of the run.

    Raises:
        UserError: fewer than 1 or more than 4 turns, or what `cache_maps` refuses.
    """
    if not 1 <= turns <= 4:
        raise UserError(f"cached_turns={turns}: expected 1 to 4 quarter turns")
    turned = [
        DistillationTiles(pairs, augment=False, seed=seed, turns=turn) for turn in range(turns)
    ]
    maps = cache_maps(folder, key, frozen, stages, turned, world, workers)
    place = {id(pair): row for row, pair in enumerate(pairs)}
    teacher = torch.stack([pair.feature for pair in pairs])
    train_rows, val_rows = ([place[id(pair)] for pair in part] for part in parts)
    return CachedMaps(maps, teacher, train_rows), CachedMaps(maps[:1], teacher, val_rows)


def make_loaders(
    train: Dataset, val: Dataset, world: World, *, share: int, seed: int, workers: int
) -> tuple[DataLoader, DataLoader]:
    """Make the training loader, shared out over processes, and the validation loader, which every
    process reads as a whole.

    Args:
        train, val: two sets of tiles, or two of cached features.
        world: this process.
        share: items per step of this process, from `share_batch`.
        seed: seed of the order of the training items.
        workers: processes that decode tiles; cached features need none.
    """
    options: dict[str, Any] = {
        "pin_memory": world.device.type == "cuda",
        "worker_init_fn": seed_worker,
    }
    if isinstance(train, CachedMaps):
        options |= {"num_workers": 0, "collate_fn": join_batch}
    else:
        options |= {"num_workers": workers}
    sampler = DistributedSampler(train, world.size, world.rank, shuffle=True, seed=seed)
    whole = len(train) >= share * world.size  # type: ignore[arg-type]
    train_loader = DataLoader(train, share, sampler=sampler, drop_last=whole, **options)
    return train_loader, DataLoader(val, share, **options)


def start_epoch(loader: DataLoader, seed: int, epoch: int) -> None:
    """Give the training loader of `make_loaders` the order and the augmentation of an epoch."""
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    if isinstance(loader.dataset, DistillationTiles):
        loader.dataset.epoch = epoch
    loader.generator = epoch_generator(seed, epoch)
