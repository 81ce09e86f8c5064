"""Reads the architecture of a self-distilled network off the shapes in its weights file.

Taken are ViTs and ResNets as DINO's main_dino.py, DINOv2 and our own pre-training write them: bare
backbones, or the backbone inside a student or a teacher. What shapes do not tell is convention:
heads of 64 channels (ViT-H: 80), LayerNorm's epsilon 1e-6, ImageNet's pixel statistics.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from patch_encoder.models.encoder_table import CROPPED, EncoderRow
from patch_encoder.models.encoder_weights import PREFIXES, find_local_file, read_state
from patch_encoder.models.transforms import Fit
from wsi_common.errors import UserError
from wsi_common.files import read_json
from wsi_common.shared_weights import WEIGHTS

DESCRIPTION = "encoder.json"  # beside the backbone that our own pre-training leaves
Shapes = dict[str, tuple[int, ...]]
HEAD_CHANNELS = 64
ODD_HEADS = {1280: 16}  # by width
# wider ones differ in their heads, and are rows of the table
MAX_WIDTH = 1536
VIT_KEYS = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"}
RESNET_KEYS = {"conv1.weight", "layer4.0.conv2.weight"}
# by (has bottlenecks, blocks per stage)
RESNET_DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def describe_dino_file(weights: str) -> EncoderRow:
    """The row of an encoder `dino`.

    Args:
        weights: the file or its folder; `#student` chooses a part.

    Raises:
        UserError: no file is given, or it holds neither a ViT nor a ResNet of a known form.
    """
    if weights in ("", "random"):
        raise UserError(
            "encoder 'dino': expected weights=<checkpoint>, found none; its size is read off the "
            "file"
        )
    path, _, choice = weights.partition("#")
    if (described := find_description(Path(path))) is not None:
        return read_description(described)
    state = read_state(find_local_file(Path(path), EncoderRow("timm", "", "", 0)), choice)
    for prefix in PREFIXES:
        inside = {
            key.removeprefix(prefix): tuple(value.shape)
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if inside.keys() >= VIT_KEYS:
            return _describe_vit(inside, path)
        if inside.keys() >= RESNET_KEYS:
            return _describe_resnet(inside, path)
    raise UserError(
        f"{path}: expected a ViT (with keys {', '.join(sorted(VIT_KEYS))}) or a ResNet (with keys "
        f"{', '.join(sorted(RESNET_KEYS))}), found {list(state)[:3]}"
    )


def find_description(path: Path) -> Path | None:
    """The description that our own pre-training leaves beside `backbone.pt`, if there is one."""
    file = (path if path.is_dir() else path.parent) / DESCRIPTION
    ours = path.is_dir() or path.name == WEIGHTS or path.name.startswith("backbone")
    return file if ours and file.is_file() else None


def read_description(file: Path) -> EncoderRow:
    """The row of a network that our own pre-training has described.

    Raises:
        UserError: the file is not such a description.
    """
    content = read_json(file, "a description of an encoder")
    try:
        mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
        mpp = content["mpp"]
        return EncoderRow(
            "timm",
            str(content["model"]),
            "",
            int(content["width"]),
            Fit(int(content["side"]), squash=True),
            (mean, std),
            mpp=None if mpp is None else float(mpp),
            tile=int(content["tile_size"]),
            licence="your own",
            options=dict(content["options"]),
            file="backbone.pt",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected a description of an encoder as pre-training writes it, found a "
            f"problem with {error}"
        ) from None


def _describe_vit(shapes: Shapes, path: str) -> EncoderRow:
    width, patch = shapes["cls_token"][-1], shapes["patch_embed.proj.weight"][-1]
    if width % HEAD_CHANNELS or width > MAX_WIDTH:
        raise UserError(
            f"{path}: expected a ViT whose width is a multiple of {HEAD_CHANNELS} up to "
            f"{MAX_WIDTH}, found {width}: its number of heads cannot be told; give it as "
            "encoder=timm:<model>"
        )
    tokens = shapes.get("reg_token") or shapes.get("register_tokens") or (1, 0, width)
    registers, positions = tokens[1], shapes["pos_embed"][1]
    # of DINOv2's positions timm adds the first to the class token
    patches = positions - 1 if "register_tokens" in shapes else positions
    bare = _is_square(patches)
    grid = patches if bare else positions - 1 - registers
    if not _is_square(grid):
        raise UserError(
            f"{path}: expected positions of a square grid, found {positions} beside {registers} "
            "registers"
        )
    side = math.isqrt(grid) * patch
    options: dict[str, Any] = {
        "patch_size": patch,
        "img_size": side,
        "embed_dim": width,
        "depth": len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
        "num_heads": ODD_HEADS.get(width, width // HEAD_CHANNELS),
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in shapes else None,
        "reg_tokens": registers,
        "no_embed_class": bare,
        "dynamic_img_size": True,
    }
    # a network for small views is given tiles of that size, with DINO's margin around the crop
    fit = CROPPED if side >= 224 else Fit(round(side * 256 / 224), side)
    return EncoderRow(
        "timm", "vit_base_patch16_224", "", width, fit, licence="your own", options=options
    )


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _describe_resnet(shapes: Shapes, path: str) -> EncoderRow:
    blocks = tuple(
        len({key.split(".")[1] for key in shapes if key.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    )
    bottlenecks = "layer4.0.conv3.weight" in shapes
    depth = RESNET_DEPTHS.get((bottlenecks, blocks))
    if depth is None:
        raise UserError(
            f"{path}: expected a ResNet-{', '.join(map(str, RESNET_DEPTHS.values()))}, found "
            f"{blocks} blocks per stage; give it as encoder=timm:<model>"
        )
    return EncoderRow(
        "timm",
        f"resnet{depth}",
        "",
        2048 if bottlenecks else 512,
        CROPPED,
        licence="your own",
        options={"layer": 4},
    )
