"""The image towers of CONCH (Lu et al., Nature Medicine 2024) and CONCH v1.5 (Ding et al., Nature
Medicine 2025).

Both are a ViT whose tokens one learned query attends to, then a LayerNorm; features are taken
there, before the contrastive projection, unnormalised (`encode_image(proj_contrast=False,
normalize=False)`, as CLAM and TRIDENT do). They are open_clip's and TITAN's own classes; here is
what the image needs of them, under their parameter names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

# what the published file of CONCH holds beside this path
UNUSED = ("proj_contrast", "attn_pool_caption.", "ln_caption.")


class AttentionPool(nn.Module):
    """One learned query attends to all tokens (CONCH: torch's attention): (B, N, C) -> (B, D)."""

    def __init__(self, dim: int, context_dim: int, heads: int = 8) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.attn = nn.MultiheadAttention(
            dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True
        )
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(context_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, D)."""
        context = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        return self.attn(query, context, context, need_weights=False)[0][:, 0]


class LinearAttentionPool(nn.Module):
    """The same in CONCH v1.5: projections without biases, keys and values from one matrix."""

    def __init__(self, dim: int, context_dim: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.ln_k, self.ln_q = nn.LayerNorm(context_dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, D)."""
        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), -1, -1)
        key, value = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value
        )  # (B, heads, 1, D / heads)
        return self.to_out(attended.transpose(1, 2).flatten(2))[:, 0]


class Conch(nn.Module):
    """ViT, attention pool, LayerNorm: (B, 3, H, W) -> (B, D)."""

    def __init__(self, trunk: nn.Module, attention_pool: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = attention_pool
        self.ln_contrast = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.ln_contrast(self.attn_pool_contrast(self.trunk.forward_features(pixels)))  # type: ignore[operator]


def build_conch_v1(**trunk: int) -> Conch:
    """ViT-B/16 at 448 px, 512-d; `trunk` changes the ViT (tests)."""
    return _conch(AttentionPool, {"embed_dim": 768, "depth": 12, "num_heads": 12, **trunk}, 512)


def build_conch_v1_5(**trunk: int) -> Conch:
    """ViT-L/16 at 448 px with layer scale, 768-d."""
    return _conch(
        LinearAttentionPool,
        {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-6, **trunk},
        768,
    )


def _conch(pool: type[nn.Module], trunk: dict[str, Any], dim: int) -> Conch:
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 448, "patch_size": 16, "num_classes": 0, **trunk}
    return Conch(VisionTransformer(**settings), pool(dim, settings["embed_dim"]), dim)


def fit_positions(weights: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Positions of another grid are resampled as CONCH v1.5 does: DINO's bicubic, with 0.1 added to
    the new side.
    """
    positions = weights.get("trunk.pos_embed")
    if positions is None or positions.shape[1] == grid * grid + 1:
        return weights
    side = math.isqrt(positions.shape[1] - 1)
    patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    resampled = nn.functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return weights | {
        "trunk.pos_embed": torch.cat(
            [positions[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1
        )
    }
