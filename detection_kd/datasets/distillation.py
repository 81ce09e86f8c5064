"""The distillation set as training items: fingerprint, split by patient, tiles with their teacher's
features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detection_kd.datasets.pair_problems import decode_tile
from detection_kd.datasets.pairs import Pair, read_pairs
from detection_kd.datasets.tile_augmentation import TileAugmentation
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes

__all__ = ["DistillationTiles", "Pair", "digest_pairs", "read_pairs", "split_by_patient"]


def digest_pairs(pairs: list[Pair]) -> str:
    """Fingerprint of a distillation set: names and features (a tile's pixels are what its feature
    was made from).
    """
    return sha256_bytes(
        *(f"{p.slide_id}/{p.image.name}".encode() + p.feature.numpy().tobytes() for p in pairs)
    )


def split_by_patient(
    pairs: list[Pair], patients: Mapping[str, str], val_fraction: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs without a patient in common; at least one patient in each.

    Args:
        pairs: all of them.
        patients: slide id -> patient, where it is known; every other slide is one of its own.
        val_fraction: share of the patients that is held out.
        seed: of the drawing.

    Raises:
        UserError: fewer than two patients.
    """
    # a slide without patient may be called as a patient is
    owners = {
        slide: ("patient", patients[slide]) if slide in patients else ("slide", slide)
        for slide in {pair.slide_id for pair in pairs}
    }
    groups = sorted(set(owners.values()))
    if len(groups) < 2:
        raise UserError(
            "distillation set: expected slides of at least two patients to validate on one of "
            f"them, found {len(groups)}"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    held_out = {groups[i] for i in order[: max(1, round(val_fraction * len(groups)))]}
    return [p for p in pairs if owners[p.slide_id] not in held_out], [
        p for p in pairs if owners[p.slide_id] in held_out
    ]


class DistillationTiles(Dataset):
    """Item: (tile uint8 (3, H, W), teacher feature float32 (D,)); the tile augmented when
    `augment`.

    The augmentation of an item follows (seed, epoch, index) alone, so that workers, resuming and
    the number of processes do not change it. Without it every tile is turned by `turns` quarters.

    Args:
        pairs: the pairs.
        augment: flips and turns, and what `augmentation` adds.
        seed: of the augmentation.
        turns: quarter turns of every tile without augmentation.
        augmentation: None: flips and turns alone.
        teacher_view: transform of a teacher that runs on the augmented tile; its result takes the
            feature's place.
    """

    def __init__(
        self,
        pairs: list[Pair],
        *,
        augment: bool,
        seed: int,
        turns: int = 0,
        augmentation: TileAugmentation | None = None,
        teacher_view: Callable[[np.ndarray], Tensor] | None = None,
    ) -> None:
        self.pairs = pairs
        self.augment = augment
        self.seed = seed
        self.turns = turns
        self.augmentation = augmentation or TileAugmentation()
        self.teacher_view = teacher_view
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        try:
            tile = decode_tile(pair.picture())
        except (OSError, ValueError) as error:
            raise UserError(f"{pair.image}: expected a tile, cannot be decoded: {error}") from None
        if self.augment:
            tile = self.augmentation(tile, np.random.default_rng((self.seed, self.epoch, index)))
        else:
            tile = np.rot90(tile, self.turns)
        tile = np.ascontiguousarray(tile)
        target = pair.feature if self.teacher_view is None else self.teacher_view(tile)
        return torch.from_numpy(tile.copy()).permute(2, 0, 1), target
