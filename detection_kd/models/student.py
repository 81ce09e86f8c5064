"""The D2VFM student: a frozen detector backbone up to one stage, global pooling, an adapter.

TS2G-KD runs all stages whatever the stage; here the backbone stops at the stage that the adapter
needs. What is frozen stays frozen under `train()`, BatchNorm statistics included. Beyond TS2G-KD,
all off by default: several stages side by side, pooling with parameters, and training of the last
stages that are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detection_kd.models.adapter import Adapter
from detection_kd.models.backbone import Trunk, rebuild_trunk
from detection_kd.models.pooling import StagePooling
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import Encoder, PixelEncoder, ToInputSize, digest_weights
from wsi_common.checkpoint import load_checkpoint, load_weights
from wsi_common.errors import UserError
from wsi_common.optim import trainable

NORM_LAYERS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


class Student(nn.Module):
    """Backbone stages (0, 1, 2 = layer2, layer3, layer4) -> pooled (B, C) -> adapter (B, D).

    Args:
        backbone: the detector's trunk; cut behind the last stage that is used.
        stages: the stages that are pooled, each on its own, and concatenated (TS2G-KD: one, its
            "needle").
        adapter: one of `ADAPTERS`.
        dim: width D of the teacher.
        input_scale: resizes the tile first (published: 1.0, the tile as it is): a detector that was
            trained on fields at half their resolution knows cells at half their size, and a smaller
            tile costs less by the square.
        pooling: one of `POOLINGS`.
        unfreeze: how many of the used stages are trained, counted from the last; never their
            normalisation layers.
    """

    def __init__(
        self,
        backbone: Trunk,
        stages: int | Sequence[int],
        adapter: str,
        dim: int,
        input_scale: float = 1.0,
        pooling: str = "mean",
        unfreeze: int = 0,
    ) -> None:
        super().__init__()
        self.stages = (stages,) if isinstance(stages, int) else tuple(stages)
        self.deepest_stage = max(self.stages)
        self.backbone = backbone.requires_grad_(False)
        self.backbone.truncate(self.deepest_stage)
        self.unfreeze = unfreeze
        for parameter in self._last_stages():
            parameter.requires_grad_(True)
        self.input_scale = input_scale
        channels = [backbone.channels[stage] for stage in self.stages]
        self.pooling = StagePooling(pooling, channels)
        self.adapter = Adapter(adapter, sum(channels), dim)

    def _last_stages(self) -> list[nn.Parameter]:
        """Parameters of the last `unfreeze` stages, without those of normalisation layers."""
        own = dict(self.backbone.named_parameters())
        norms = {
            id(p)
            for m in self.backbone.modules()
            if isinstance(m, NORM_LAYERS)
            for p in m.parameters(recurse=False)
        }
        # the backbone counts stem (0) and strides 4 (1), 8 (2), 16 (3), 32 (4)
        last = self.deepest_stage + 2
        found = [
            own[name]
            for name, stage in self.backbone.stages().items()
            if last - self.unfreeze < stage <= last
        ]
        return [parameter for parameter in found if id(parameter) not in norms]

    def train(self, mode: bool = True) -> Student:
        """Train pooling and adapter only; BatchNorm of a trained stage keeps its statistics."""
        super().train(mode)
        self.backbone.eval()
        return self

    def maps(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """Normalised pixels -> maps of the stages; autograd sees the stages that are trained and
        nothing before them.
        """
        with torch.set_grad_enabled(self.unfreeze > 0 and torch.is_grad_enabled()):
            maps = self.all_maps(pixels)
            return [maps[stage] for stage in self.stages]

    def all_maps(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """Normalised pixels -> maps of every stage up to the last stage."""
        if self.input_scale != 1.0:
            pixels = nn.functional.interpolate(
                pixels,
                scale_factor=self.input_scale,
                mode="bilinear",
                antialias=True,
                recompute_scale_factor=True,
            ).contiguous(memory_format=torch.channels_last)
        return self.backbone(pixels, upto=self.deepest_stage)

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Normalised pixels -> globally pooled features of the stages."""
        return self.pooling(self.maps(pixels))

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Normalised pixels (B, 3, H, W) -> (B, D)."""
        return self.adapter(self.pooled(pixels))


class FrozenMaps(PixelEncoder):
    """The half of a student that is not trained: uint8 tiles (B, 3, H, W) -> what `StudentHead`
    takes.

    Where pooling has no parameters it is done here, and a map is left with one cell (B, C, 1, 1).
    """

    def __init__(self, student: Student) -> None:
        super().__init__(student, IMAGENET)

    @torch.no_grad()
    def forward(self, pixels: UInt8[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """uint8 (B, 3, H, W) -> [(B, C, h, w), ...], one map per stage."""
        maps = self.network.maps(self.scaled(pixels))
        return (
            [x.mean(dim=(2, 3), keepdim=True) for x in maps]
            if self.network.pooling.kind == "mean"
            else maps
        )


class StudentHead(nn.Module):
    """The other half, pooling and adapter, on what `FrozenMaps` gives: the student's output."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.pooling, self.adapter = student.pooling, student.adapter

    def forward(self, maps: Sequence[Float[Tensor, "b _c _h _w"]]) -> Float[Tensor, "b d"]:
        """[(B, C, h, w), ...] -> (B, D)."""
        return self.adapter(self.pooling(maps))


def check_student_keys(
    stages: Sequence[int], input_scale: float, unfreeze: int, unfreeze_lr: float
) -> None:
    """Refuse settings that no student can have; they are named as the keys of `train_d2vfm`.

    Raises:
        UserError: unknown or unordered stages, a scale outside (0, 4], more trained stages than
            are used, or a factor of their learning rate that is not positive.
    """
    if not set(stages) <= {0, 1, 2} or list(stages) != sorted(set(stages)):
        raise UserError(f"stages={stages}: expected 0, 1 or 2 (layer2, layer3, layer4), ascending")
    if not 0 < input_scale <= 4:
        raise UserError(f"input_scale={input_scale}: expected a factor above 0, at most 4")
    if not 0 <= unfreeze <= max(stages) + 3 or unfreeze_lr <= 0:
        raise UserError(
            f"unfreeze={unfreeze} unfreeze_lr={unfreeze_lr:g}: expected 0 to "
            f"{max(stages) + 3} stages "
            "(the last that is used, the one before, ..., the stem) and a factor above 0"
        )


def build_student_network(student: Student, *, cached: bool, device: torch.device) -> nn.Module:
    """Build what takes the items of a set, on the device: the whole student for tiles,
    or its head for `cached` features of its backbone.
    """
    module = StudentHead(student) if cached else PixelEncoder(student, IMAGENET)
    return module.to(device, memory_format=torch.channels_last)


def group_student_parameters(
    student: Student, lr: float, unfreeze_lr: float
) -> list[dict[str, Any]]:
    """Parameter groups: pooling and adapter at `lr`, backbone stages at `unfreeze_lr` times it."""
    groups: list[dict[str, Any]] = [
        {"params": [*student.pooling.parameters(), *student.adapter.parameters()], "lr": lr}
    ]
    stages = trainable(student.backbone)
    return [*groups, {"params": stages, "lr": lr * unfreeze_lr}] if stages else groups


def describe_student(student: Student, teacher: str) -> dict[str, Any]:
    """The part of a checkpoint's config from which `load_student` rebuilds the model."""
    return {
        "backbone": student.backbone.describe(),
        "stages": list(student.stages),
        "pooling": student.pooling.kind,
        "unfreeze": student.unfreeze,
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
        raise UserError(
            f"{path}: expected a D2VFM checkpoint (config.student), found keys "
            f"{sorted(content['config'])[:6]}"
        )
    backbone = rebuild_trunk(config["backbone"])
    student = Student(
        backbone,
        config["stages"],
        config["adapter"],
        config["dim"],
        config["input_scale"],
        config["pooling"],
    )
    load_weights(student, content["model"], str(path))
    return student.eval(), config


def load_student_encoder(path: str | Path, name: str) -> Encoder:
    """The student as one more encoder: tiles at their native size, ImageNet statistics (as TS2G-KD
    extracts).

    Args:
        path: checkpoint of `train_d2vfm`.
        name: folder name of its bags.
    """
    student, config = load_student(path)
    transform = ToInputSize(None)
    stages = "+".join(map(str, student.stages))
    pooled = "" if student.pooling.kind == "mean" else f" {student.pooling.kind}"
    provenance = {
        "encoder": f"d2vfm {config['adapter']} stage {stages}{pooled} scale "
        f"{config['input_scale']:g}",
        "weights_sha256": digest_weights(student),
        "transform": f"{transform!r}, mean/std {IMAGENET}",
    }
    if config["teacher"]:
        provenance["teacher"] = config["teacher"]
    module = PixelEncoder(student, IMAGENET).eval().requires_grad_(False)
    return Encoder(name, config["dim"], transform, module, provenance)
