"""From an encoder's name to its row: the table, or any model of timm, open_clip and transformers,
or a DINO checkpoint.

    timm:<model>[.<tag>]    open_clip:<model>/<pretrained tag>    hf:<repository or folder>    dino

For these, width, input and statistics come from the library's own configuration; `dino` reads the
architecture off the weights (`dino_files`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from patch_encoder.models.dino_files import describe_dino_file
from patch_encoder.models.encoder_table import (
    ALIASES,
    ENCODERS,
    IMAGENET,
    OPENAI_CLIP,
    EncoderRow,
)
from patch_encoder.models.encoder_weights import fetch_hub_file
from patch_encoder.models.transforms import Fit
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import read_json

RESAMPLING = {0: "bicubic", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
PATTERNS = ("timm:<model>", "open_clip:<model>/<tag>", "hf:<repository or folder>", "dino")


def find_row(name: str, weights: str = "") -> EncoderRow:
    """The row of an encoder's name; `weights` is looked at by `dino` and `hf:` alone.

    Raises:
        UserError: a name that neither the table nor a library has.
    """
    name = ALIASES.get(name, name)
    if name in ENCODERS:
        return ENCODERS[name]
    library, _, model = name.partition(":")
    finders = {"timm": _timm, "open_clip": _open_clip}
    if library in finders and model:
        return finders[library](name, model)
    if library == "hf" and model:
        return _hugging_face(name, model, weights)
    if name == "dino":
        return describe_dino_file(weights)
    raise UserError(
        f"encoder '{name}': expected a known encoder or {', '.join(PATTERNS)}; "
        f"{did_you_mean(name, ENCODERS.keys() | ALIASES.keys())}"
    )


def _timm(name: str, model: str) -> EncoderRow:
    import timm

    if not timm.is_model(model.split(".")[0]):
        raise UserError(
            f"encoder '{name}': timm {timm.__version__} has no such model; "
            f"{did_you_mean(model, timm.list_models())}"
        )
    published = timm.get_pretrained_cfg(model)
    settings = timm.data.resolve_data_config(
        pretrained_cfg=published.to_dict() if published else {}
    )
    side = settings["input_size"][-1]
    squash = settings["crop_mode"] == "squash"
    fit = Fit(math.floor(side / settings["crop_pct"]), side, settings["interpolation"], squash)
    with torch.device("meta"):
        width = timm.create_model(model, num_classes=0).num_features
    licence = (published.license or "") if published else ""
    statistics = (tuple(settings["mean"]), tuple(settings["std"]))
    hub = (published.hf_hub_id or "") if published else ""
    return EncoderRow(
        "timm", model, hub or f"timm/{model}", width, fit, statistics, licence=licence
    )


def _open_clip(name: str, model: str) -> EncoderRow:
    import open_clip

    architecture, _, tag = model.partition("/")
    settings = open_clip.get_model_config(architecture)
    if settings is None:
        raise UserError(
            f"encoder '{name}': open_clip has no such model; "
            f"{did_you_mean(architecture, open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise UserError(
            f"encoder '{name}': {architecture} has no such weights; {did_you_mean(tag, tags)}"
        )
    published = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    side = settings["vision_cfg"].get("image_size", 224)
    side = side[0] if isinstance(side, (list, tuple)) else side
    squash = published.get("resize_mode") == "squash"
    fit = Fit(side, None if squash else side, published.get("interpolation", "bicubic"), squash)
    statistics = (
        tuple(published.get("mean", OPENAI_CLIP[0])),
        tuple(published.get("std", OPENAI_CLIP[1])),
    )
    options = {"quick_gelu": True} if published.get("quick_gelu") else {}
    hub = published.get("hf_hub", "").strip("/")
    return EncoderRow(
        "open_clip", architecture, hub, settings["embed_dim"], fit, statistics, options=options
    )


def _hugging_face(name: str, model: str, weights: str) -> EncoderRow:
    import transformers

    folder = Path(model) if Path(model).is_dir() else None
    local = Path(weights.partition("#")[0])
    if (
        weights not in ("", "random")
        and (local if local.is_dir() else local.parent).joinpath("config.json").is_file()
    ):
        folder = local if local.is_dir() else local.parent
    hub = EncoderRow("transformers", "", model, 0)
    file = folder / "config.json" if folder else fetch_hub_file(hub, name, ["config.json"])
    settings = read_json(file, "a transformers configuration")
    kind = settings.get("model_type", "")
    if kind == "clip":
        settings = {
            **settings.get("vision_config", {}),
            "projection_dim": settings.get("projection_dim", 512),
        }
    elif kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"encoder '{name}': model_type '{kind}' is no model of transformers "
            f"{transformers.__version__}"
        )
    architecture = "CLIPVisionModelWithProjection" if kind == "clip" else _model_class(kind, name)
    processor = file.with_name("preprocessor_config.json")
    if not folder and not processor.is_file():
        processor = fetch_hub_file(hub, name, ["preprocessor_config.json"])
    fit, statistics = _processor(
        read_json(processor, "an image processor's configuration") if processor.is_file() else {}
    )
    width = (
        settings.get("projection_dim" if kind == "clip" else "hidden_size")
        or settings.get("hidden_sizes", [0])[-1]
    )
    options = {
        key: value
        for key, value in settings.items()
        if key not in ("model_type", "architectures", "auto_map")
    }
    return EncoderRow(
        "transformers", architecture, str(folder or model), width, fit, statistics, options=options
    )


def _model_class(kind: str, name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = MODEL_MAPPING_NAMES.get(kind)
    if not isinstance(found, str):
        raise UserError(
            f"encoder '{name}': model_type '{kind}' has no single model class; give one of ViT, "
            "DINOv2 or CLIP kind"
        )
    return found


def _processor(settings: dict[str, Any]) -> tuple[Fit, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The rule of a `preprocessor_config.json`; without one: 224 px, bicubic, ImageNet."""
    size, crop = settings.get("size", 224), settings.get("crop_size")
    interpolation = RESAMPLING.get(settings.get("resample", 3), "bicubic")
    side = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height")
    squash = isinstance(size, int) is False and "height" in size
    if isinstance(size, int):
        squash = not settings.get("do_center_crop", False)
    cropped = (
        (crop if isinstance(crop, int) else (crop or {}).get("height"))
        if settings.get("do_center_crop")
        else None
    )
    statistics = (
        tuple(settings.get("image_mean", IMAGENET[0])),
        tuple(settings.get("image_std", IMAGENET[1])),
    )
    return Fit(
        side if settings.get("do_resize", True) else None, cropped, interpolation, squash
    ), statistics
