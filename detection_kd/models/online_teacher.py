"""The teacher in the training loop: its features of the augmented tiles themselves, instead of the
stored ones of plain tiles.

The teacher's own transform runs in the workers, on the augmented uint8 tile; its network, frozen,
runs where the student does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from detection_kd.datasets.pair_problems import decode_tile
from detection_kd.datasets.pairs import Pair
from patch_encoder.models.encoders import Encoder, build_encoder
from wsi_common.device import autocast
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
COMPARED_TILES = 8
LEAST_AGREEMENT = 0.9  # cosine; the same teacher on a tile that was stored as JPEG is far above


class OnlineTeacher:
    """A frozen encoder: items that its transform made -> features (B, D) on the device.

    Attributes:
        transform: uint8 (H, W, 3) -> an item; for the workers.
        digest: of its weights and transform.
    """

    def __init__(self, encoder: Encoder, device: torch.device, precision: str) -> None:
        self.name, self.dim, self.transform = encoder.name, encoder.dim, encoder.transform
        self.digest = f"{encoder.provenance['weights_sha256']} {encoder.provenance['transform']}"
        self._model = (
            encoder.model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        )
        self._device, self._precision = device, precision

    @torch.no_grad()
    def __call__(self, items: Tensor) -> Float[Tensor, "b d"]:
        """(B, ...) -> float32 (B, D)."""
        with autocast(self._device, self._precision):
            return self._model(items.to(self._device, non_blocking=True)).float()

    def check(self, tiles: Sequence[np.ndarray], stored: Float[Tensor, "b d"]) -> None:
        """Compare with the stored features of the same, unaugmented tiles: validation goes by
        those.

        Raises:
            UserError: another width, or features that have little to do with the stored ones.
        """
        if self.dim != stored.shape[1]:
            raise UserError(
                f"online_teacher={self.name}: expected a teacher of width {stored.shape[1]} as "
                "the stored features, found "
                f"{self.dim}; name the encoder that made the set"
            )
        found = self(torch.stack([self.transform(tile) for tile in tiles])).cpu()
        agreement = float(torch.nn.functional.cosine_similarity(found, stored).mean())
        logger.info(
            "online teacher %s: cosine %.4f with the stored features of %d tiles",
            self.name,
            agreement,
            len(stored),
        )
        if not agreement >= LEAST_AGREEMENT:
            raise UserError(
                f"online_teacher={self.name}: expected the stored features of plain tiles, found "
                f"a cosine of {agreement:.3f} "
                "with them; give the weights (teacher_weights) and crop (teacher_crop) that made "
                "the set"
            )


def build_online_teacher(
    name: str, weights: str, crop: bool, device: torch.device, precision: str
) -> OnlineTeacher:
    """The encoder of that name with local weights or those of its hub; `crop` as in
    extract_features.
    """
    return OnlineTeacher(build_encoder(name, weights, crop=crop), device, precision)


def read_online_teacher(
    name: str, weights: str, crop: bool, pairs: Sequence[Pair], device: torch.device, precision: str
) -> OnlineTeacher | None:
    """The same, compared with the stored features of a few of the pairs; None without a name."""
    if not name:
        return None
    teacher = build_online_teacher(name, weights, crop, device, precision)
    few = pairs[:: max(1, len(pairs) // COMPARED_TILES)][:COMPARED_TILES]
    teacher.check(
        [decode_tile(pair.picture()) for pair in few], torch.stack([pair.feature for pair in few])
    )
    return teacher
