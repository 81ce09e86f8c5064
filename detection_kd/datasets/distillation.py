"""The distillation set: tiles with their teacher's features, as `mil.rank_patches` writes it.

<root>/wsi_root/<slide>/<patch>.jpg    the tile
<root>/wsi_root/<slide>/<patch>.pt     its teacher feature, float32 (D,)
<root>/ann_root/ann.json               COCO-style list of the images
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from common.checkpoint import load_tensors
from common.errors import UserError
from common.files import read_json, sha256_bytes


@dataclass(frozen=True)
class Pair:
    """One tile and its teacher feature (D,)."""

    slide_id: str
    image: Path
    feature: Tensor


def read_pairs(root: str | Path) -> list[Pair]:
    """All pairs of a distillation set, checked before any training.

    Raises:
        UserError: one line with the number of broken pairs and the first of them: missing image or feature, feature
            that is no finite vector or of another width.
    """
    root = Path(root)
    listing = read_json(root / "ann_root" / "ann.json", "the list of distillation images")
    if not isinstance(listing, dict) or not listing.get("images"):
        raise UserError(f"{root}/ann_root/ann.json: expected a COCO-style file with images, found none")
    pairs, problems = [], []
    for entry in listing["images"]:
        image = root / "wsi_root" / entry["file_name"]
        try:
            pairs.append(_read_pair(image))
        except UserError as error:
            problems.append(str(error))
    widths = sorted({len(pair.feature) for pair in pairs})
    if len(widths) > 1:
        problems.append(f"features of several widths {widths}")
    if problems:
        raise UserError(f"{root}: {len(problems)} of {len(listing['images'])} pairs cannot be used, first: {problems[0]}")
    return pairs


def _read_pair(image: Path) -> Pair:
    if not image.is_file():
        raise UserError(f"{image}: expected a tile, found no file")
    feature = load_tensors(image.with_suffix(".pt"), "a teacher feature")
    if not isinstance(feature, Tensor) or feature.dim() != 1 or not torch.isfinite(feature).all():
        raise UserError(f"{image.with_suffix('.pt')}: expected one finite vector (D,)")
    return Pair(image.parent.name, image, feature.float())


def pairs_digest(pairs: list[Pair]) -> str:
    """Fingerprint of a distillation set: names and features (a tile's pixels are what its feature was made from)."""
    return sha256_bytes(*(f"{p.slide_id}/{p.image.name}".encode() + p.feature.numpy().tobytes() for p in pairs))


def split_by_slide(pairs: list[Pair], val_share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs without a slide in common; at least one slide in each.

    Raises:
        UserError: fewer than two slides.
    """
    slides = sorted({pair.slide_id for pair in pairs})
    if len(slides) < 2:
        raise UserError(f"distillation set: expected at least two slides to validate on one of them, found {len(slides)}")
    order = np.random.default_rng(seed).permutation(len(slides))
    held_out = {slides[i] for i in order[: max(1, round(val_share * len(slides)))]}
    return [p for p in pairs if p.slide_id not in held_out], [p for p in pairs if p.slide_id in held_out]


class DistillationTiles(Dataset):
    """Item: (tile uint8 (3, H, W), teacher feature float32 (D,)); flipped and turned at random when `augment`.

    The augmentation of an item follows (seed, epoch, index) alone, so that workers, resuming and the number of
    processes do not change it. Without it every tile is turned by `turns` quarters.
    """

    def __init__(self, pairs: list[Pair], *, augment: bool, seed: int, turns: int = 0) -> None:
        self.pairs = pairs
        self.augment = augment
        self.seed = seed
        self.turns = turns
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        try:
            with Image.open(pair.image) as image:
                tile = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{pair.image}: expected a tile, cannot be decoded: {error}") from None
        if self.augment:
            turns, flip = np.random.default_rng((self.seed, self.epoch, index)).integers((4, 2))
            tile = np.rot90(tile[:, ::-1] if flip else tile, turns)
        else:
            tile = np.rot90(tile, self.turns)
        return torch.from_numpy(tile.copy()).permute(2, 0, 1), pair.feature
