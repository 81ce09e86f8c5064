"""One small interface over every encoder: a transform for the workers, a module for the device, a width, a provenance.

A tile leaves the worker as uint8 (3, H, W), a quarter of float32's traffic; scaling and normalisation run on the
device inside the module. Encoders load from a local file or folder (`weights=`), else from their hub by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError, did_you_mean
from common.files import sha256_bytes
from patch_encoder.models.backbones import build_backbone, load_backbone_weights
from patch_encoder.models.encoder_table import ENCODERS, IMAGENET, EncoderRow
from patch_encoder.models.mean_colour import mean_colour
from patch_encoder.models.stain_texture import DIM as STAIN_TEXTURE_DIM
from patch_encoder.models.stain_texture import stain_texture

RANDOM = "random"
CLASSICAL: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "stain_texture": (STAIN_TEXTURE_DIM, stain_texture),
    "mean_colour": (3, mean_colour),
}


@dataclass(frozen=True)
class Encoder:
    """What the extraction loop needs of an encoder.

    Attributes:
        name: folder name of its bags.
        dim: width D of its features.
        transform: uint8 (H, W, 3) tile -> one item of the batch; runs in the workers.
        model: batch of items -> (B, D); runs on the device.
        provenance: name, weights digest, transform: what decides the numbers.
    """

    name: str
    dim: int
    transform: Callable[[np.ndarray], Tensor]
    model: nn.Module
    provenance: dict[str, str]


class ToInputSize:
    """uint8 (H, W, 3) -> uint8 (3, side, side): bicubic with antialiasing; `side=None` keeps the tile's own size."""

    def __init__(self, side: int | None) -> None:
        self.side = side

    def __call__(self, tile: np.ndarray) -> UInt8[Tensor, "3 h w"]:
        if self.side is not None and tile.shape[:2] != (self.side, self.side):
            tile = np.asarray(Image.fromarray(tile).resize((self.side, self.side), Image.Resampling.BICUBIC))
        return torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous()

    def __repr__(self) -> str:
        return f"resize({self.side}, bicubic)" if self.side else "native size"


class Describe:
    """uint8 (H, W, 3) -> float32 (D,): a classical descriptor, computed in the workers."""

    def __init__(self, descriptor: Callable[[np.ndarray], np.ndarray]) -> None:
        self.descriptor = descriptor

    def __call__(self, tile: np.ndarray) -> Float[Tensor, " d"]:
        return torch.from_numpy(self.descriptor(tile))

    def __repr__(self) -> str:
        return self.descriptor.__name__


class PixelEncoder(nn.Module):
    """Scale and normalise pixels, then the network; optionally L2-normalise its output."""

    def __init__(
        self, network: nn.Module, statistics: tuple[tuple[float, ...], tuple[float, ...]], normalise: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
        self.register_buffer("mean", mean * 255, persistent=False)
        self.register_buffer("std", std * 255, persistent=False)

    def forward(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """uint8 (B, 3, H, W) -> (B, D)."""
        scaled = ((pixels.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = self.network(scaled)
        return nn.functional.normalize(features.float(), dim=-1) if self.normalise else features


def build_encoder(name: str, weights: str = "") -> Encoder:
    """An encoder by name.

    Args:
        name: a row of `encoder_table.ENCODERS`, or `timm:<model name>`.
        weights: local file or folder; empty: from the encoder's hub; `random`: initialised only (for cost and tests).

    Raises:
        UserError: unknown name, weights that are missing or of another architecture, hub out of reach.
    """
    if name in CLASSICAL:
        dim, descriptor = CLASSICAL[name]
        transform = Describe(descriptor)
        return Encoder(
            name, dim, transform, nn.Identity(), {"encoder": name, "weights_sha256": "none", "transform": repr(transform)}
        )
    row = _row(name)
    network = build_backbone(row, pretrained=weights == "", name=name)
    if weights not in ("", RANDOM):
        load_backbone_weights(network, row, Path(weights))
    module = PixelEncoder(network, row.statistics, row.normalise).eval().requires_grad_(False)
    transform = ToInputSize(row.input_size)
    provenance = {
        "encoder": name,
        "weights_sha256": weights_digest(network),
        "transform": f"{transform!r}, mean/std {row.statistics}, L2 {row.normalise}",
    }
    return Encoder(name.replace(":", "_").replace("/", "_"), row.width, transform, module, provenance)


def _row(name: str) -> EncoderRow:
    if name in ENCODERS:
        return ENCODERS[name]
    if not name.startswith("timm:"):
        raise UserError(f"encoder '{name}': expected a known encoder or timm:<model>; {did_you_mean(name, ENCODERS)}")
    import timm

    model = name.removeprefix("timm:")
    if not timm.is_model(model.split(".")[0]):
        raise UserError(
            f"encoder '{name}': timm {timm.__version__} has no such model; {did_you_mean(model, timm.list_models())}"
        )
    config = timm.get_pretrained_cfg(model)
    side = config.input_size[-1] if config else 224
    statistics = (tuple(config.mean), tuple(config.std)) if config else IMAGENET
    with torch.device("meta"):
        width = timm.create_model(model, num_classes=0).num_features
    return EncoderRow("timm", model, f"timm/{model}", width, statistics, side)


def weights_digest(module: nn.Module) -> str:
    """Digest of a module's parameters and buffers by name; `meta` for a module without storage."""
    parts: list[bytes] = []
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            return "meta"
        flat = tensor.detach().cpu().contiguous().view(-1)
        parts += [name.encode(), flat.view(torch.uint8).numpy().tobytes()]
    return sha256_bytes(*parts)
