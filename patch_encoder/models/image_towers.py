"""Image paths of published encoders that timm does not have as they are.

CONCH (Lu et al., Nature Medicine 2024) and CONCH v1.5 (Ding et al., Nature Medicine 2025): a ViT
whose tokens one learned query attends to, then a LayerNorm; features are taken there, before the
contrastive projection, unnormalised (`encode_image(proj_contrast=False, normalize=False)`, as CLAM
and TRIDENT do). They are open_clip's and TITAN's own classes; here is what the image needs of them,
under their parameter names.

CTransPath (Wang et al., Medical Image Analysis 2022): timm's Swin-T, but with `ConvStem` in place
of its 4x4 patch embedding.

KEEP (Zhou et al., Cancer Cell 2026): UNI's ViT-L/16, then two linear layers with a GELU between
them. Its card runs its own code, whose image half is written out here under its parameter names.

MUSK (Xiang et al., Nature 2025): a BEiT-3 (arXiv 2208.10442) keeps two experts per layer, A for
images and B for text. An image only uses A, and A is a plain ViT with inner norms, which timm has
as `beit3_large_patch16_224`, so that its weights only need other names. Its features are the class
token after the last norm, with neither the contrastive head nor multi-scale inputs
(`with_head=False, ms_aug=False`), as TRIDENT takes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# what the published file of CONCH holds beside this path
CONCH_UNUSED = ("proj_contrast", "attn_pool_caption.", "ln_caption.")


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
    return _build_conch(
        AttentionPool, {"embed_dim": 768, "depth": 12, "num_heads": 12, **trunk}, 512
    )


def build_conch_v1_5(**trunk: int) -> Conch:
    """ViT-L/16 at 448 px with layer scale, 768-d."""
    return _build_conch(
        LinearAttentionPool,
        {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-6, **trunk},
        768,
    )


def _build_conch(pool: type[nn.Module], trunk: dict[str, Any], dim: int) -> Conch:
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 448, "patch_size": 16, "num_classes": 0, **trunk}
    return Conch(VisionTransformer(**settings), pool(dim, settings["embed_dim"]), dim)


KEEP_UNUSED = ("text.", "logit_scale")  # the text half of its file


class Keep(nn.Module):
    """ViT and projection: (B, 3, H, W) -> (B, D), not yet of unit length."""

    def __init__(self, visual: nn.Module, width: int, dim: int) -> None:
        super().__init__()
        self.visual = visual
        self.visual_head = nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.visual_head(self.visual(pixels))


def build_keep(**trunk: int) -> Keep:
    """ViT-L/16 with layer scale at 224 px, 768-d; `trunk` changes the ViT (tests)."""
    from timm.models.vision_transformer import VisionTransformer

    settings = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5, **trunk}
    visual = VisionTransformer(patch_size=16, num_classes=0, dynamic_img_size=True, **settings)
    return Keep(visual, settings["embed_dim"], 768)


def rename_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """KEEP's file calls the factor of a layer scale `weight`, timm `gamma`."""
    return {re.sub(r"\.(ls[12])\.weight$", r".\1.gamma", key): w for key, w in weights.items()}


def fit_positions(weights: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Resample positions as CONCH v1.5 does: DINO's bicubic, with 0.1 added to the new side."""
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


class ConvStem(nn.Module):
    """Two strided 3x3 convolutions, then 1x1: (B, 3, H, W) -> (B, H / 4, W / 4, embed_dim).

    The signature is that of timm's PatchEmbed.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.patch_size = (height, width), (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        widths = (in_chans, embed_dim // 8, embed_dim // 4)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C)."""
        return self.norm(self.proj(pixels).permute(0, 2, 3, 1))


BEIT_PREFIX = "beit3."
# torchscale's names -> timm's, applied in this order
BEIT_RENAMES = (
    (r"^vision_embed\.cls_token$", "cls_token"),
    (r"^vision_embed\.proj\.", "patch_embed.proj."),
    (r"^encoder\.embed_positions\.weight$", "pos_embed"),
    (r"^encoder\.layer_norm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.self_attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
    (r"\.ffn\.ffn_layernorm\.", ".mlp.norm."),
    (r"\.ffn\.", ".mlp."),
)
MUSK_UNUSED = ("text_embed.", "vision_embed.mask_token")


def convert_to_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Expert A of a BEiT-3 state dict under timm's names; other dicts are returned as they are."""
    if not any(name.startswith(BEIT_PREFIX) for name in weights):
        return weights
    renamed = {name: tensor for name, tensor in weights.items() if not name.startswith(BEIT_PREFIX)}
    for name, tensor in weights.items():
        inner = name.removeprefix(BEIT_PREFIX)
        if inner is name or ".B." in inner or inner.startswith(MUSK_UNUSED):
            continue
        inner = inner.replace(".A.", ".")
        for pattern, replacement in BEIT_RENAMES:
            inner = re.sub(pattern, replacement, inner)
        # fairseq's positions start at 2
        renamed[inner] = tensor[None, 2:] if inner == "pos_embed" else tensor
    return _join_attention(renamed)


def _join_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """q_proj, k_proj, v_proj -> qkv."""
    joined = dict(weights)
    for name in [name for name in weights if ".attn.q_proj." in name]:
        parts = [joined.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        joined[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return joined
