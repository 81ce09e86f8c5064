"""The D2VFM student: a frozen detector backbone up to one stage, global average pooling, an adapter.

TS2G-KD runs all stages whatever the needle; here the backbone stops at the stage that the adapter needs. What is
frozen stays frozen under `train()`, BatchNorm statistics included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.checkpoint import load_checkpoint, load_weights
from common.errors import UserError
from detection_kd.models.adapter import Adapter
from detection_kd.models.backbone import Backbone
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import Encoder, PixelEncoder, ToInputSize, weights_digest


class Student(nn.Module):
    """Backbone stage `needle` (0, 1, 2 = layer2, layer3, layer4) -> pooled (B, C) -> adapter (B, D).

    `input_scale` resizes the tile first (published: 1.0, the tile as it is): a detector that was trained on fields at
    half their resolution knows cells at half their size, and a smaller tile costs less by the square.
    """

    def __init__(self, backbone: Backbone, needle: int, adapter: str, dim: int, input_scale: float = 1.0) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.backbone.truncate(needle)
        self.needle = needle
        self.input_scale = input_scale
        self.adapter = Adapter(adapter, backbone.channels[needle], dim)

    def train(self, mode: bool = True) -> Student:
        """Training mode for the adapter only."""
        super().train(mode)
        self.backbone.eval()
        return self

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Normalised pixels -> globally pooled features of the needle's stage; no gradient reaches the backbone."""
        with torch.no_grad():
            if self.input_scale != 1.0:
                pixels = nn.functional.interpolate(
                    pixels, scale_factor=self.input_scale, mode="bilinear", antialias=True, recompute_scale_factor=True
                ).contiguous(memory_format=torch.channels_last)
            return self.backbone(pixels, upto=self.needle)[-1].mean(dim=(2, 3))

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Normalised pixels (B, 3, H, W) -> (B, D)."""
        return self.adapter(self.pooled(pixels))


class Pooled(nn.Module):
    """The frozen half of a student as a module of its own: normalised pixels (B, 3, H, W) -> (B, C)."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """(B, 3, H, W) -> (B, C)."""
        return self.student.pooled(pixels)


def student_config(student: Student, teacher: str) -> dict[str, Any]:
    """The part of a checkpoint's config from which `load_student` rebuilds the model."""
    return {
        "backbone": student.backbone.describe(),
        "needle": student.needle,
        "adapter": student.adapter.kind,
        "dim": student.adapter.out.out_features,
        "input_scale": student.input_scale,
        "teacher": teacher,
    }


def load_student(path: str | Path) -> tuple[Student, dict[str, Any]]:
    """Rebuild a student from its checkpoint alone.

    Raises:
        UserError: no checkpoint, or one of something else.
    """
    content = load_checkpoint(path, "a D2VFM checkpoint")
    config = content["config"].get("student")
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a D2VFM checkpoint (config.student), found keys {sorted(content['config'])[:6]}")
    backbone = Backbone.from_description(config["backbone"])
    student = Student(backbone, config["needle"], config["adapter"], config["dim"], config["input_scale"])
    load_weights(student, content["model"], str(path))
    return student.eval(), config


def student_encoder(path: str | Path, name: str) -> Encoder:
    """The student as one more encoder: tiles at their native size, ImageNet statistics (as TS2G-KD extracts).

    Args:
        path: checkpoint of `train_d2vfm`.
        name: folder name of its bags.
    """
    student, config = load_student(path)
    transform = ToInputSize(None)
    provenance = {
        "encoder": f"d2vfm {config['adapter']} needle {config['needle']} scale {config['input_scale']:g}",
        "weights_sha256": weights_digest(student),
        "transform": f"{transform!r}, mean/std {IMAGENET}",
    }
    module = PixelEncoder(student, IMAGENET).eval().requires_grad_(False)
    return Encoder(name, config["dim"], transform, module, provenance)
