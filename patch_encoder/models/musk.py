"""MUSK's image path (Xiang et al., Nature 2025) as timm's ViT: renames the weights of a BEiT-3
(arXiv 2208.10442).

BEiT-3 keeps two experts a layer, A for images and B for text. Of an image only A is used, and A is
a plain ViT with inner norms, which timm has as `beit3_large_patch16_224`. Its features are the
class token after the last norm, with neither the contrastive head nor multi-scale inputs
(`with_head=False, ms_aug=False`), as TRIDENT takes them.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

PREFIX = "beit3."
# torchscale's names -> timm's, applied in this order
RENAMES = (
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
UNUSED = ("text_embed.", "vision_embed.mask_token")


def convert_to_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Expert A of a BEiT-3 state dict under timm's names; a dict of other names is handed back as
    it is.
    """
    if not any(name.startswith(PREFIX) for name in weights):
        return weights
    renamed = {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}
    for name, tensor in weights.items():
        inner = name.removeprefix(PREFIX)
        if inner is name or ".B." in inner or inner.startswith(UNUSED):
            continue
        inner = inner.replace(".A.", ".")
        for pattern, replacement in RENAMES:
            inner = re.sub(pattern, replacement, inner)
        # fairseq's positions start at 2
        renamed[inner] = tensor[None, 2:] if inner == "pos_embed" else tensor
    return _joined_attention(renamed)


def _joined_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """q_proj, k_proj, v_proj -> qkv."""
    joined = dict(weights)
    for name in [name for name in weights if ".attn.q_proj." in name]:
        parts = [joined.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        joined[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return joined
