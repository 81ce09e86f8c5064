"""Deformable DETR: ResNet trunk, input projections, deformable transformer, class and box heads.

Source: Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159). Parameter names are those of the
published checkpoints (`backbone.` is ours, see `checkpoint_import`). Differences:
- fewer levels are allowed (the coarsest stages are kept), and any trunk of `backbone.py`;
- heads run in full precision under autocast, because a bfloat16 box is off by 0.4 % of the image;
- outputs are stacked over decoder layers, and none is optional: the auxiliary losses are part of
  the method.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detection_kd.models.backbone import Trunk, rebuild_trunk
from detection_kd.models.deformable_transformer import (
    Architecture,
    DeformableTransformer,
    Detections,
)
from detection_kd.models.denoising import make_noised_targets
from wsi_common.checkpoint import load_checkpoint, load_weights
from wsi_common.distributed import World, wrap
from wsi_common.errors import UserError

PRIOR = 0.01  # initial probability of every class (RetinaNet, section 4.1)


class ClassHead(nn.Linear):
    """Class logits in full precision; starts at probability `PRIOR`."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes)
        nn.init.constant_(self.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, input: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n classes"]:
        """Logits of every class."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class BoxHead(nn.Module):
    """Three-layer perceptron in full precision that starts at 0 for the centre and at `size` for
    width and height.

    Args:
        dim: channels.
        size: initial logit of width and height.
    """

    def __init__(self, dim: int, size: float) -> None:
        super().__init__()
        last = nn.Linear(dim, 4)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.tensor([0.0, 0.0, size, size]))
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), last])

    def forward(self, x: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n 4"]:
        """Shift of (cx, cy, w, h) in logits."""
        first, second, last = self.layers
        with torch.autocast(x.device.type, enabled=False):
            return last(second(first(x.to(next(self.parameters()).dtype)).relu()).relu())


class DeformableDETR(nn.Module):
    """Images -> class logits and boxes of a fixed number of queries.

    Args:
        backbone: trunk that gives the maps of strides 8, 16 and 32 px.
        classes: object classes; there is no background class (focal loss).
        architecture: sizes and switches.

    Raises:
        UserError: settings that no network can have.
    """

    def __init__(self, backbone: Trunk, classes: int, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        _check(a)
        self.backbone = backbone
        self.architecture = a
        self.transformer = DeformableTransformer(a)
        self.input_proj = nn.ModuleList(_projections(backbone.channels, a.levels, a.hidden_dim))
        self.query_embed = _query_embedding(a)
        self.label_embed = nn.Embedding(classes, a.hidden_dim) if a.denoising else None
        if a.box_refine:  # own heads per layer; only the first one starts small, the others refine
            heads = a.decoder_layers + a.two_stage
            sizes = [0.0 if a.two_stage or layer else -2.0 for layer in range(heads)]
            self.class_embed = nn.ModuleList(
                [ClassHead(a.hidden_dim, classes) for _ in range(heads)]
            )
            self.bbox_embed = nn.ModuleList([BoxHead(a.hidden_dim, size) for size in sizes])
        else:
            self.class_embed = nn.ModuleList([ClassHead(a.hidden_dim, classes)] * a.decoder_layers)
            self.bbox_embed = nn.ModuleList([BoxHead(a.hidden_dim, -2.0)] * a.decoder_layers)

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        padding: Bool[Tensor, "b h w"],
        annotated: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> Detections:
        """Predictions of every decoder layer.

        Args:
            images: normalised, padded to one size on the right and at the bottom.
            padding: True where a pixel is padding.
            annotated: labels and boxes of each image, for denoising in training.
        """
        noised = None
        if self.training and self.label_embed is not None:
            assert annotated is not None, "denoising needs the annotations"
            noised = make_noised_targets(
                *annotated, self.label_embed.num_embeddings, self.architecture.denoising
            )
        features = self.backbone(images)
        pyramid = self.transformer.pyramid(self.project(features), padding)
        queries = None if self.query_embed is None else self.query_embed.weight
        return self.transformer(
            pyramid, queries, self.class_embed, self.bbox_embed, noised, self.label_embed
        )

    def project(
        self, features: list[Float[Tensor, "b _c _h _w"]]
    ) -> list[Float[Tensor, "b d _h2 _w2"]]:
        """The coarsest maps in D channels, and one of stride 64 px when there are four levels."""
        maps = features[-self.architecture.levels :]
        projected = [
            projection(map) for projection, map in zip(self.input_proj, maps, strict=False)
        ]
        if len(self.input_proj) > len(maps):
            projected.append(self.input_proj[-1](features[-1]))
        return projected


def _check(a: Architecture) -> None:
    if not 1 <= a.levels <= 4:
        raise UserError(f"levels={a.levels}: expected 1, 2, 3 or 4 feature levels")
    if a.hidden_dim % 32 or a.hidden_dim % a.heads:
        raise UserError(
            f"hidden_dim={a.hidden_dim}: expected a multiple of 32 and of heads={a.heads}"
        )
    if a.decoder_layers < 1 or a.encoder_layers < 0 or a.queries < 1:
        raise UserError(
            f"decoder_layers={a.decoder_layers}, encoder_layers={a.encoder_layers}, "
            f"queries={a.queries}: "
            "expected at least 1, 0 and 1"
        )
    if a.two_stage and not a.box_refine:
        raise UserError("two_stage=true: expected box_refine=true with it, found box_refine=false")
    if a.mixed_selection and not a.two_stage:
        raise UserError(
            "mixed_selection=true: expected two_stage=true with it, found two_stage=false"
        )
    if a.groups < 1 or a.denoising < 0:
        raise UserError(f"groups={a.groups}, denoising={a.denoising}: expected at least 1 and 0")
    if a.groups > 1 and a.two_stage and not a.mixed_selection:
        raise UserError(
            f"groups={a.groups} with two_stage=true: all groups would be the same; set "
            "mixed_selection=true"
        )
    if a.denoising and not a.two_stage:
        raise UserError(
            f"denoising={a.denoising}: expected two_stage=true with it, found two_stage=false"
        )


def _query_embedding(a: Architecture) -> nn.Embedding | None:
    """Learned queries: position and content (mixed selection: content), or none (two-stage)."""
    if a.two_stage and not a.mixed_selection:
        return None
    return nn.Embedding(
        a.groups * a.queries, a.hidden_dim if a.mixed_selection else 2 * a.hidden_dim
    )


def _projections(channels: tuple[int, ...], levels: int, dim: int) -> list[nn.Module]:
    """1x1 convolutions of the coarsest maps; a fourth level is strided 3x3 from the last."""
    convolutions = [nn.Conv2d(width, dim, 1) for width in channels[-levels:]]
    if levels > len(channels):
        convolutions.append(nn.Conv2d(channels[-1], dim, 3, stride=2, padding=1))
    for parameter in (
        parameter for convolution in convolutions for parameter in convolution.parameters()
    ):
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    return [nn.Sequential(convolution, nn.GroupNorm(32, dim)) for convolution in convolutions]


def describe_detector(model: DeformableDETR, categories: list[str]) -> dict[str, Any]:
    """What `build_detector` needs, for a checkpoint's `config`."""
    return {
        "kind": "deformable_detr",
        "backbone": model.backbone.describe(),
        "architecture": asdict(model.architecture),
        "categories": categories,
    }


def build_detector(description: dict[str, Any], trunk: Trunk | None = None) -> DeformableDETR:
    """A detector with fresh weights from its description; `trunk`: where it was given as an object,
    which no description builds.
    """
    backbone = trunk or rebuild_trunk(description["backbone"])
    return DeformableDETR(
        backbone, len(description["categories"]), Architecture(**description["architecture"])
    )


def load_detector(
    path: str | Path, trunk: Trunk | None = None
) -> tuple[DeformableDETR, dict[str, Any]]:
    """A detector and its description (`categories`, ...) from its checkpoint alone.

    Args:
        path: the checkpoint.
        trunk: the trunk of a detector that was trained on a given object, with any weights.

    Raises:
        UserError: no detector checkpoint.
    """
    content = load_checkpoint(path, "a detector checkpoint")
    kind = content["config"].get("kind")
    if kind != "deformable_detr":
        raise UserError(
            f"{path}: expected a detector checkpoint (kind deformable_detr), found kind {kind!r}"
        )
    model = build_detector(content["config"], trunk)
    load_weights(model, content["model"], str(path))
    return model, content["config"]


def place_detector(model: DeformableDETR, world: World, *, compile: bool) -> nn.Module:
    """Move a detector to its device and make it ready for training in one or many processes.

    Args:
        model: the detector; it is changed in place.
        world: this process.
        compile: whether the backbone is compiled.

    Raises:
        UserError: trainable batch norm in several processes without CUDA.
    """
    model = model.to(world.device)
    model.backbone.to(memory_format=torch.channels_last)
    if compile:
        model.backbone.compile()
    if world.size > 1 and model.backbone.norm == "batch":
        if world.device.type != "cuda":
            raise UserError(
                f"norm=batch: expected CUDA with {world.size} processes, found "
                f"{world.device.type}; set norm=group"
            )
        # in place, since the detector itself is no batch norm
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return wrap(model, world)
