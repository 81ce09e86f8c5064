"""Building encoder networks through timm, open_clip and transformers, and loading their weights
strictly.

Only the image tower is built, and always from the table's settings: a hub gives weights, never
code.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch_encoder.models.encoder_table import EncoderRow
from patch_encoder.models.encoder_weights import (
    HEADS,
    TEXT_TOWER,
    fetch_hub_file,
    find_local_file,
    find_published_file,
    load_encoder_weights,
    read_state,
    skip_initialisation,
)
from patch_encoder.models.image_towers import ConvStem, build_conch_v1, build_conch_v1_5, build_keep
from patch_encoder.models.pooling import TokenPool, TransformersPool, TruncatedResNet
from wsi_common.errors import UserError
from wsi_common.files import read_json

LAYERS = {"ConvStem": ConvStem, "silu": nn.SiLU}


def build_backbone(row: EncoderRow, weights: str, name: str) -> nn.Module:
    """The network of a table row.

    Args:
        row: the encoder's row.
        weights: empty: from its hub or package; `random`: initialised only; else a local file
            (`#student` chooses a part) or folder.
        name: for errors.

    Raises:
        UserError: weights that cannot be had or do not fit.
    """
    if weights == "random":
        return initialise(row)
    path, _, choice = weights.partition("#")
    file = find_local_file(Path(path), row) if path else find_published_file(row, name)
    state = read_state(file, choice)
    if row.library == "transformers":
        return TransformersPool(_load_transformers(row, state, str(file)), row.pool)
    with skip_initialisation():
        network = initialise(_read_published_tower(row, file.parent, name, from_hub=not path))
    load_encoder_weights(network, row, state, str(file))
    return network


def initialise(row: EncoderRow) -> nn.Module:
    """The network of a row with initial weights (on the meta device: none)."""
    if row.library == "timm":
        return _build_timm(row)
    if row.library == "open_clip":
        return _build_open_clip(row)
    if row.library == "transformers":
        return TransformersPool(
            _find_transformers_class(row)(_make_transformers_config(row), **_split_arguments(row)),
            row.pool,
        )
    towers = {"conch": build_conch_v1, "conch_v1_5": build_conch_v1_5, "keep": build_keep}
    return towers[row.library]()


def _build_timm(row: EncoderRow) -> nn.Module:
    import timm

    options = {key: _check_layer(value) for key, value in row.options.items()}
    layer = options.pop("layer", None)
    network = timm.create_model(row.model, pretrained=False, num_classes=0, **options)
    tokens = getattr(network, "num_prefix_tokens", -1)
    if row.pool and (tokens < 0 or (tokens == 0 and row.pool != "mean")):
        raise UserError(
            f"encoder '{row.model}': pool={row.pool} is for transformers with a class token; use "
            "pool=published"
        )
    if layer:
        return TruncatedResNet(network, layer)
    return TokenPool(network, row.pool) if row.pool else network


def _check_layer(value: Any) -> Any:
    import timm.layers

    if not isinstance(value, str):
        return value
    return LAYERS.get(value) or getattr(timm.layers, value, value)


def _build_open_clip(row: EncoderRow) -> nn.Module:
    import open_clip
    from open_clip.model import _build_vision_tower

    published = row.options.get("vision_cfg")
    settings = (
        {"vision_cfg": published, **row.options}
        if published
        else dict(open_clip.get_model_config(row.model) or {})
    )
    vision = {**settings["vision_cfg"], "timm_model_pretrained": False}
    quick_gelu = row.options.get("quick_gelu", settings.get("quick_gelu", False))
    return _build_vision_tower(row.width, vision, quick_gelu)


def _read_published_tower(
    row: EncoderRow, folder: Path, name: str, *, from_hub: bool
) -> EncoderRow:
    """The row with the image tower that `open_clip_config.json` beside the weights names."""
    if row.library != "open_clip":
        return row
    file = folder / "open_clip_config.json"
    if from_hub and not file.is_file():
        file = fetch_hub_file(row, name, ["open_clip_config.json"])
    if not file.is_file():
        return row
    settings = read_json(file, "an open_clip configuration")
    settings = settings.get("model_cfg", settings)
    if settings.get("embed_dim") != row.width:
        raise UserError(
            f"{file}: expected embed_dim {row.width} for '{name}', found "
            f"{settings.get('embed_dim')}"
        )
    # some published files leave out that the tower was trained with QuickGELU: then the table's own
    # setting counts
    quick_gelu = {"quick_gelu": settings["quick_gelu"]} if "quick_gelu" in settings else {}
    return replace(
        row, options={**_quick_gelu(row), **quick_gelu, "vision_cfg": settings["vision_cfg"]}
    )


def _quick_gelu(row: EncoderRow) -> dict[str, bool]:
    import open_clip

    published = open_clip.get_model_config(row.model) or {}
    return {"quick_gelu": bool(row.options.get("quick_gelu", published.get("quick_gelu", False)))}


def _find_transformers_class(row: EncoderRow) -> Any:
    import transformers

    return getattr(transformers, row.model)


def _make_transformers_config(row: EncoderRow) -> Any:
    return _find_transformers_class(row).config_class(**row.options)


def _split_arguments(row: EncoderRow) -> dict[str, bool]:
    return {"add_pooling_layer": False} if row.model == "ViTModel" else {}


def _load_transformers(row: EncoderRow, state: dict[str, Tensor], source: str) -> nn.Module:
    """The model with a state dict; transformers renames keys of its older versions."""
    state = _remove_known_prefix(state)
    config = _make_transformers_config(row)
    for name, value in state.items():
        if name.endswith("embeddings.position_embeddings"):
            config.image_size = math.isqrt(value.shape[1] - 1) * config.patch_size
    model, report = _find_transformers_class(row).from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32,
        ignore_mismatched_sizes=True, **_split_arguments(row),
    )  # fmt: skip
    unexpected = [
        key for key in report["unexpected_keys"] if not key.startswith(HEADS + TEXT_TOWER)
    ]
    missing = [key for key in report["missing_keys"] if not key.endswith("mask_token")]
    reshaped = [str(entry) for entry in report["mismatched_keys"]]
    if missing or unexpected or reshaped:
        raise UserError(
            f"{source}: weights of another architecture: {len(missing)} missing "
            f"{sorted(missing)[:2]}, {len(unexpected)} "
            f"unexpected {sorted(unexpected)[:2]}, {len(reshaped)} of another shape "
            f"{sorted(reshaped)[:2]}; give the weights "
            f"of a {row.model} with the same settings"
        )
    return model


def _remove_known_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`backbone.` and the like, where every key has it or stands beside the encoder."""
    for prefix in ("backbone.", "model.", "encoder.model.", "network.model."):
        inside = [key for key in state if key.startswith(prefix)]
        if inside and all(key.startswith((prefix, *HEADS)) for key in state):
            return {key.removeprefix(prefix): state[key] for key in inside}
    return state
