"""One small interface over every encoder: a transform for the workers, a module for the device, a
width, a provenance.

A tile leaves the worker as uint8 (3, H, W), a quarter of float32's traffic; scaling and
normalisation run on the device inside the module. Encoders load from a local file or folder
(`weights=`), else from their hub by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from patch_encoder.descriptors.colour_statistics import DIM as COLOUR_STATISTICS_DIM
from patch_encoder.descriptors.colour_statistics import colour_statistics
from patch_encoder.descriptors.mean_colour import mean_colour
from patch_encoder.descriptors.sharpness import DIM as SHARPNESS_DIM
from patch_encoder.descriptors.sharpness import sharpness
from patch_encoder.descriptors.stain_texture import DIM as STAIN_TEXTURE_DIM
from patch_encoder.descriptors.stain_texture import stain_texture
from patch_encoder.models.backbones import build_backbone
from patch_encoder.models.encoder_names import find_row
from patch_encoder.models.encoder_table import ALIASES, EncoderRow, Statistics
from patch_encoder.models.pooling import POOLS
from patch_encoder.models.transforms import Describe, ToInputSize
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes

RANDOM = "random"
CLASSICAL: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "stain_texture": (STAIN_TEXTURE_DIM, stain_texture),
    "mean_colour": (3, mean_colour),
    "colour_statistics": (COLOUR_STATISTICS_DIM, colour_statistics),
    "sharpness": (SHARPNESS_DIM, sharpness),
}
LAYER_WIDTHS = {
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
}


TILE_SIZE, MPP = 256, 0.5  # of tiles for an encoder of whose training nothing is known


@dataclass(frozen=True)
class Encoder:
    """What the extraction loop needs of an encoder.

    Attributes:
        name: folder name of its bags.
        dim: width D of its features.
        transform: uint8 (H, W, 3) tile -> one item of the batch; runs in the workers.
        model: batch of items -> (B, D); runs on the device.
        provenance: name, weights digest, transform: what decides the numbers.
        mpp, tile: resolution and side in pixels of the tiles that it was trained on; None: unknown.
    """

    name: str
    dim: int
    transform: Callable[[np.ndarray], Tensor]
    model: nn.Module
    provenance: dict[str, str]
    mpp: float | None = None
    tile: int | None = None

    @property
    def tile_size(self) -> int:
        """Side in px of the tiles to cut for it: as in its training, or 256 where that is
        unknown.
        """
        return self.tile or TILE_SIZE

    @property
    def target_mpp(self) -> float:
        """um per px of the tiles to cut for it: as in its training, or 0.5 where that is
        unknown.
        """
        return self.mpp or MPP


class PixelEncoder(nn.Module):
    """Scale and normalise pixels, then the network; optionally L2-normalise its output."""

    def __init__(self, network: nn.Module, statistics: Statistics, normalise: bool = False) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
        self.register_buffer("mean", mean * 255, persistent=False)
        self.register_buffer("std", std * 255, persistent=False)

    def scaled(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """uint8 -> normalised pixels, channels last."""
        return ((pixels.float() - self.mean) / self.std).contiguous(
            memory_format=torch.channels_last
        )

    def forward(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """uint8 (B, 3, H, W) -> (B, D)."""
        features = self.network(self.scaled(pixels))
        return nn.functional.normalize(features.float(), dim=-1) if self.normalise else features


def build_encoder(
    name: str,
    weights: str = "",
    pool: str = "published",
    layer: int = 0,
    crop: bool = True,
    *,
    untrained: bool = False,
) -> Encoder:
    """An encoder by name.

    Args:
        name: a row of `encoder_table.ENCODERS` or its name elsewhere (`ALIASES`), or a pattern of
            `encoder_names`.
        weights: local file or folder; empty: from the encoder's hub; `random`: initialised only
            (for cost and tests).
        pool: published, or cls | mean | cls_mean of a transformer's tokens.
        layer: stage 1 to 4 of a ResNet that is pooled; 0: as the row says.
        crop: centre crop where the encoder's own processor has one; else the whole tile is resized
            to its input.
        untrained: the network is initialised only; `weights` still say of which size it is.

    Raises:
        UserError: unknown name, an option that the encoder does not have, weights that are missing
            or of another architecture, hub out of reach.
    """
    name = ALIASES.get(name, name)
    if name in CLASSICAL:
        return _build_classical(name, pool, layer)
    row = find_row(name, weights)
    chosen = _set_layer(_set_pool(row, pool, name), layer, name)
    fit = chosen.fit if crop else chosen.fit.whole()
    network = build_backbone(chosen, RANDOM if untrained else weights, name)
    module = PixelEncoder(network, chosen.statistics, chosen.normalise).eval().requires_grad_(False)
    transform = ToInputSize(fit)
    changed = (pool,) * (chosen.pool != row.pool) + (f"layer{layer}",) * (
        chosen.options != row.options
    )
    label = "-".join((name, *changed))
    provenance = {
        "encoder": label,
        "weights_sha256": digest_weights(network),
        "transform": f"{transform!r}, mean/std {chosen.statistics}, L2 {chosen.normalise}",
    }
    folder = label.replace(":", "_").replace("/", "_")
    return Encoder(folder, chosen.width, transform, module, provenance, row.mpp, row.tile)


def _build_classical(name: str, pool: str, layer: int) -> Encoder:
    if pool != POOLS[0] or layer:
        raise UserError(
            f"encoder '{name}': expected pool=published and layer=0, found pool={pool} "
            f"layer={layer}"
        )
    dim, descriptor = CLASSICAL[name]
    transform = Describe(descriptor)
    provenance = {"encoder": name, "weights_sha256": "none", "transform": repr(transform)}
    return Encoder(name, dim, transform, nn.Identity(), provenance)


def _set_pool(row: EncoderRow, pool: str, name: str) -> EncoderRow:
    if pool not in POOLS:
        raise UserError(
            f"encoder '{name}': pool expected one of {', '.join(POOLS)}, found '{pool}'"
        )
    if pool in (POOLS[0], row.pool):
        return row
    has_tokens = row.library == "transformers" and row.model.startswith(
        ("ViT", "Dinov2", "DINOv3ViT")
    )
    if not has_tokens and row.library != "timm":
        raise UserError(
            f"encoder '{name}': pool={pool} is for transformers with a class token; use "
            "pool=published"
        )
    token_width = row.width // 2 if row.pool == "cls_mean" else row.width
    return replace(row, pool=pool, width=token_width * (2 if pool == "cls_mean" else 1))


def _set_layer(row: EncoderRow, layer: int, name: str) -> EncoderRow:
    if layer in (0, row.options.get("layer")):
        return row
    widths = LAYER_WIDTHS.get(row.model.split(".")[0])
    if widths is None or layer not in (1, 2, 3, 4):
        raise UserError(
            f"encoder '{name}': layer expected 1 to 4 and a ResNet-18, 34 or 50, found "
            f"layer={layer} for {row.model}"
        )
    return replace(row, width=widths[layer - 1], options={**row.options, "layer": layer})


def digest_weights(module: nn.Module) -> str:
    """Digest of a module's parameters and buffers by name; `meta` for a module without storage."""
    parts: list[bytes] = []
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            return "meta"
        flat = tensor.detach().cpu().contiguous().view(-1)
        parts += [name.encode(), flat.view(torch.uint8).numpy().tobytes()]
    return sha256_bytes(*parts)
