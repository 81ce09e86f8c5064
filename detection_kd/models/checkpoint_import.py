"""Names of published Deformable DETR weights -> ours, for transformer and heads.

The backbone is not renamed here: `backbone.load_backbone` takes the trunk of published checkpoints.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

HUGGINGFACE = (
    (r"^model\.input_proj\.", "input_proj."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.(enc_output|enc_output_norm|pos_trans|pos_trans_norm)\.", r"transformer.proposals.\1."),
    (r"^model\.(level_embed|reference_points|encoder|decoder)", r"transformer.\1"),
    (r"\.mlp\.fc([12])\.", r".linear\1."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.encoder_attn_layer_norm\.", ".norm1."),
    (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.o_proj\.", ".out_proj."),
)
OFFICIAL = ((r"^transformer\.(enc_output|enc_output_norm|pos_trans|pos_trans_norm)\.", r"transformer.proposals.\1."),)


def from_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `transformers.DeformableDetrForObjectDetection` without its backbone, under our names."""
    kept = {name: value for name, value in weights.items() if not name.startswith("model.backbone.")}
    return _join_projections(_rename(kept, HUGGINGFACE))


def from_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of fundamentalvision/Deformable-DETR without its backbone, under our names."""
    kept = {name: value for name, value in weights.items() if not name.startswith("backbone.")}
    return _rename(kept, OFFICIAL)


def _rename(weights: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".decoder.class_embed." not in name and ".decoder.bbox_embed." not in name:  # the same heads a second time
            renamed[name] = value
    return renamed


def _join_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate q, k and v projections -> one `in_proj`."""
    joined = {name: value for name, value in weights.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in weights:
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return joined
