"""Where a network looks in a tile: the attention of a ViT's class token, or the strength of the
last feature map where there is none.

The attention is that of the last block, as in figure 1 of DINO (Caron et al., ICCV 2021): softmax
of the class token's query with the keys of all tokens, head by head. With registers (Darcet et al.,
ICLR 2024) a part of it falls on these, so that the patches' shares need not sum to 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from patch_encoder.models.encoders import PixelEncoder

ATTENTION = "attention of the class token in the last block"
NORM = "length of the vectors of the last feature map"


def describe_maps(network: nn.Module) -> str:
    """What `make_maps` shows of this network."""
    return ATTENTION if has_class_attention(network) else NORM


def has_class_attention(network: Any) -> bool:
    """Whether the network is a ViT whose class token is its output."""
    from timm.models.vision_transformer import VisionTransformer

    return (
        isinstance(network, VisionTransformer)
        and network.cls_token is not None
        and hasattr(network.blocks[-1].attn, "qkv")
    )


@torch.no_grad()
def make_maps(
    encoder: PixelEncoder, tiles: UInt8[Tensor, "b 3 h w"]
) -> Float[Tensor, "b heads rows cols"]:
    """A map per tile and head; one "head" where the network has no class token.

    Args:
        encoder: in evaluation mode.
        tiles: of the side that the network takes, on its device.
    """
    network, pixels = encoder.network, encoder.scaled(tiles)
    if not has_class_attention(network):
        return measure_last_map(network, pixels)[:, None]
    shares = attend(network, pixels)[:, :, _count_prefix(network) :]
    return _fold(shares, pixels)


def attend(network: Any, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b heads tokens"]:
    """Shares of a ViT's class token in the last block, which sum to 1 over all tokens: class token,
    registers, patches.
    """
    found: list[Tensor] = []

    def compute(module: Any, inputs: tuple[Tensor, ...]) -> None:
        batch, tokens, _ = inputs[0].shape
        split = module.qkv(inputs[0]).reshape(batch, tokens, 3, module.num_heads, -1)
        queries, keys, _ = split.float().permute(2, 0, 3, 1, 4)
        query, keys = module.q_norm(queries[:, :, :1]), module.k_norm(keys)
        found.append((module.scale * query @ keys.transpose(-2, -1)).softmax(dim=-1)[:, :, 0])

    hook = network.blocks[-1].attn.register_forward_pre_hook(compute)
    try:
        network.forward_features(pixels)
    finally:
        hook.remove()
    return found[0]


def measure_last_map(
    network: Any, pixels: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b rows cols"]:
    """L2 norm of the vectors of the last feature map, place by place."""
    features = network.forward_features(pixels).float()
    if features.ndim == 3:  # tokens, the patches last
        lengths = features[:, _count_prefix(network) :].norm(dim=-1)
        return _fold(lengths[:, None], pixels)[:, 0]
    channels = -1 if getattr(network, "output_fmt", "NCHW") == "NHWC" else 1
    return features.norm(dim=channels)


def _count_prefix(network: Any) -> int:
    """Tokens before those of the patches."""
    return int(getattr(network, "num_prefix_tokens", 0))


def _fold(
    values: Float[Tensor, "b heads patches"], pixels: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b heads rows cols"]:
    """Values of patches, row by row, as maps of the shape of the picture."""
    rows = math.isqrt(values.shape[-1] * pixels.shape[-2] // pixels.shape[-1])
    return values.unflatten(-1, (rows, -1))
