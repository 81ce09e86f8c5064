"""Backbones that self-distillation can train, and the weights that they may start from.

ViTs have the state dict of DINO's (`cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.i.*`,
`norm`) and ResNets that of torchvision's, so what a run leaves behind loads wherever files of DINO
do. Positions are interpolated in the forward pass to the size of the view. With registers (Darcet
et al., ICLR 2024) positions belong to patches alone, as in timm; the class token's own is part of
that token. timm interpolates with antialiasing, DINO without: views smaller than `image_size` see
slightly smoother positions here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from patch_encoder.models.encoder_names import find_row
from patch_encoder.models.encoder_table import EncoderRow
from patch_encoder.models.encoder_weights import (
    find_local_file,
    find_published_file,
    load_encoder_weights,
    read_state,
)
from wsi_common.errors import UserError, did_you_mean

RANDOM = "random"
VITS = ("vit_tiny", "vit_small", "vit_base", "vit_large")
RESNETS = ("resnet18", "resnet50")


def build_student_backbone(
    arch: str,
    *,
    patch_size: int = 16,
    registers: int = 0,
    image_size: int = 224,
    drop_path: float = 0.0,
    init: str = RANDOM,
) -> nn.Module:
    """A network (B, 3, H, W) -> (B, D), with D as its `num_features`.

    Args:
        arch: vit_tiny, vit_small, vit_base, vit_large, resnet18, resnet50, or timm:<model>.
        patch_size: side in pixels of a ViT's patches: 8, 14 or 16.
        registers: extra tokens of a ViT that are no output.
        image_size: side in pixels of the global views, which a ViT's positions are made for.
        drop_path: stochastic depth, rising linearly to this rate at the last block.
        init: random; the name of an encoder whose published weights fit (imagenet_lite0,
            dino_vits16, timm:<model>.<tag>); or a weights file as the encoder loader takes it.

    Raises:
        UserError: an unknown architecture, an option that it does not have, or weights that cannot
            be had or do not fit.
    """
    if arch not in VITS and registers:
        raise UserError(f"registers={registers}: expected a ViT, found arch={arch}; set it to 0")
    if not 0 <= drop_path < 1:
        raise UserError(f"drop_path={drop_path:g}: expected a share below 1, and 0 for none")
    model, options = describe_architecture(
        arch, patch_size=patch_size, registers=registers, image_size=image_size
    )
    network = _build(arch, model, options, drop_path)
    load_initial_weights(network, init)
    return network


def describe_architecture(
    arch: str, *, patch_size: int, registers: int, image_size: int
) -> tuple[str, dict[str, Any]]:
    """The name that timm has for a network, and the options that it is built with.

    Args:
        arch, patch_size, registers, image_size: as for `build_student_backbone`.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    options: dict[str, Any] = {}
    if arch in VITS:
        if image_size % patch_size:
            raise UserError(
                f"global views of {image_size} px: expected a multiple of patch_size={patch_size}"
            )
        options = {"img_size": image_size, "patch_size": patch_size, "dynamic_img_size": True}
        return f"{arch}_patch16_224", {
            **options,
            "reg_tokens": registers,
            "no_embed_class": registers > 0,
        }
    model = arch if arch in RESNETS else arch.removeprefix("timm:")
    if (model == arch) != (arch in RESNETS) or not timm.is_model(model.split(".")[0]):
        known = (*VITS, *RESNETS, *(f"timm:{name}" for name in timm.list_models()))
        raise UserError(f"arch={arch}: no such network; {did_you_mean(arch, known)}")
    if arch not in RESNETS:
        with torch.device("meta"):
            if isinstance(timm.create_model(model, num_classes=0), VisionTransformer):
                options = {"img_size": image_size, "dynamic_img_size": True}
    return model, options


def _build(arch: str, model: str, options: dict[str, Any], drop_path: float) -> nn.Module:
    import timm

    start: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if arch in RESNETS:
        # torchvision's start, which DINO has: residual branches count from the first step
        start["zero_init_last"] = False
    try:
        network = timm.create_model(model, num_classes=0, **options, **start)
    except TypeError:
        raise UserError(
            f"drop_path={drop_path}: expected a network with stochastic depth, found arch={arch}; "
            "set it to 0"
        ) from None
    if arch in VITS:
        # as DINO draws it; timm's is next to zero
        nn.init.trunc_normal_(network.cls_token, std=0.02)
    return network


def find_initial_row(init: str) -> EncoderRow | None:
    """The row of the encoder that `init` names; None where it is random or a file.

    Raises:
        UserError: no such encoder, or none of timm's.
    """
    if init == RANDOM or Path(init.partition("#")[0]).exists():
        return None
    try:
        row = find_row(init)
    except UserError as error:
        raise UserError(
            f"init={init}: expected random, a weights file or an encoder's name; {error}"
        ) from None
    if row.library != "timm":
        raise UserError(
            f"init={init}: expected a network of timm, found one of {row.library}; only "
            "backbones of timm can be trained on"
        )
    return row


def load_initial_weights(network: nn.Module, init: str) -> None:
    """Put the weights that `init` names into a backbone, every key accounted for."""
    if init == RANDOM:
        return
    path, _, choice = init.partition("#")
    row = find_initial_row(init)
    if row is None:
        row = EncoderRow("timm", "", "", 0)
        file = find_local_file(Path(path), row)
    else:
        file, choice = find_published_file(row, init, key="init"), ""
    load_encoder_weights(network, row, read_state(file, choice), str(file))
