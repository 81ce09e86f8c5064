"""Whole detectors from elsewhere: the official layout and Hugging Face's -> our names, fitted to
other categories and queries.

Source: fundamentalvision/Deformable-DETR and transformers' `DeformableDetrForObjectDetection`, in
the names of its releases 4 and 5.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection_kd.models.backbone import HUB, STAGES, fill_pretrained, read_trunk_weights
from detection_kd.models.deformable_detr import DeformableDETR
from wsi_common.checkpoint import load_weights, read_weights
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)

HUGGINGFACE = (
    (r"^model\.input_proj\.", "input_proj."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (
        r"^model\.(enc_output|enc_output_norm|pos_trans|pos_trans_norm)\.",
        r"transformer.proposals.\1.",
    ),
    (r"^model\.(level_embed|reference_points|encoder|decoder)", r"transformer.\1"),
    (r"(?:\.mlp)?\.fc([12])\.", r".linear\1."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.encoder_attn_layer_norm\.", ".norm1."),
    (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.o_proj\.", ".out_proj."),
)
FITTED = re.compile(
    r"^(transformer\.decoder\.)?class_embed\.|^label_embed\."
)  # as wide as there are categories
OFFICIAL = (
    (
        r"^transformer\.(enc_output|enc_output_norm|pos_trans|pos_trans_norm)\.",
        r"transformer.proposals.\1.",
    ),
)


def load_published(model: DeformableDETR, path: str | Path, categories: list[str]) -> list[str]:
    """Fill a detector from a checkpoint of ours, of the official code or of Hugging Face, to train
    it further.

    Class heads start afresh where the file's are of other categories; queries are cut, or new ones
    stay random.

    Args:
        model: detector of the same architecture.
        path: `.pt`, `.pth`, `.bin` or `.safetensors`.
        categories: class names of `model`.

    Returns:
        Names of the parameters that kept their initial values, in whole or in part.

    Raises:
        UserError: no detector, or one of another architecture.
    """
    content = read_weights(path, "a detector's weights")
    weights = _our_names(content, path)
    own = model.state_dict()
    described = (
        content["config"].get("categories", categories)
        if isinstance(content.get("config"), dict)
        else categories
    )
    fitted, fresh = {}, []
    for name, value in own.items():
        given = weights.pop(name, None)
        if FITTED.search(name) and (
            given is None or given.shape != value.shape or described != categories
        ):
            fitted[name] = value
            fresh.append(name)
        elif (
            name == "query_embed.weight"
            and given is not None
            and given.shape[1:] == value.shape[1:]
        ):
            fitted[name] = torch.cat((given[: len(value)], value[len(given) :]))
            fresh += [name] * (len(given) < len(value))
        elif name.endswith("num_batches_tracked"):
            fitted[name] = torch.zeros_like(value)
        elif given is not None:
            fitted[name] = given
    unknown = {
        name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")
    }
    load_weights(model, fitted | unknown, str(path))
    return fresh


def _our_names(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    weights = content.get("model", content)
    if any(name.startswith("model.decoder.") for name in weights):
        renamed = convert_huggingface(weights)
    elif any(name.startswith("backbone.0.body.") for name in weights):
        renamed = convert_official(weights)
    elif any(name.startswith("transformer.decoder.") for name in weights):
        return dict(weights)
    else:
        raise UserError(
            f"{path}: expected a Deformable DETR (ours, official or Hugging Face's names), found "
            f"{sorted(weights)[:3]}; "
            "a backbone alone goes to weights="
        )
    return renamed | {
        f"backbone.{name}": value for name, value in read_trunk_weights(content).items()
    }


def convert_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of transformers' Deformable DETR, without its backbone, to ours."""
    kept = {
        name: value for name, value in weights.items() if not name.startswith("model.backbone.")
    }
    return _join_projections(_rename(kept, HUGGINGFACE))


def convert_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of fundamentalvision/Deformable-DETR without its backbone, under our names."""
    kept = {name: value for name, value in weights.items() if not name.startswith("backbone.")}
    return _rename(kept, OFFICIAL)


def _rename(weights: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if (
            ".decoder.class_embed." not in name and ".decoder.bbox_embed." not in name
        ):  # the same heads a second time
            renamed[name] = value
    return renamed


def _join_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate q, k and v projections -> one `in_proj`."""
    joined = {
        name: value for name, value in weights.items() if not re.search(r"\.[qkv]_proj\.", name)
    }
    for name in weights:
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return joined


def load_initial_weights(
    model: DeformableDETR,
    categories: list[str],
    *,
    weights: str,
    detector: str,
    pretrained: bool,
    freeze: int,
) -> None:
    """Fill a fresh detector with the weights that its training starts from, if any, and freeze the
    first stages of a trunk that has some.

    Args:
        model: the detector.
        categories: its class names.
        weights: file or folder of weights of the trunk; "": none.
        detector: checkpoint of a whole detector; "": none.
        pretrained: whether the trunk takes ImageNet's weights when no file is given.
        freeze: how many stages of stem and strides 4, 8, 16, 32 stay as they are.

    Raises:
        UserError: an impossible `freeze`, both files at once, or weights that cannot be used.
    """
    if not 0 <= freeze <= STAGES:
        raise UserError(f"freeze={freeze}: expected 0 to {STAGES} stages")
    if weights and detector:
        raise UserError("weights= and detector= are both given: expected one of them")
    trunk = model.backbone
    if weights or (pretrained and not detector):
        fill_pretrained(trunk, weights or HUB)
    if detector:
        fresh = load_published(model, detector, categories)
        but = f" but for {', '.join(fresh)}" if fresh else ""
        logger.info("%s: weights taken%s", detector, but)
    if weights or pretrained or detector:
        trunk.freeze(freeze)
