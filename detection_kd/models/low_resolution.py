"""A network that grades patches at a resolution of its own: a trunk, the average of its map, a
linear layer.

Source: AT+ (see `losses.attention_transfer`), where a student's image is reduced and then enlarged
to its teacher's size, so that it costs as much: `enlarged=true`. Differences: by default a student
sees its image as it is, ratio^2 times fewer pixels; its checkpoint says for which resolution, pixel
statistics and grades it was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from detection_kd.losses.resolution_losses import LAST, GradingOutput, ResolutionTerms
from detection_kd.models.cam import NORMS
from detection_kd.models.grading_trunks import build_trunk, trace_shape
from detection_kd.models.normalised_network import NormalisedNetwork
from patch_encoder.selfdistill.backbone import RANDOM
from wsi_common.checkpoint import load_checkpoint_of, load_weights
from wsi_common.config import key
from wsi_common.errors import UserError

KIND = "grading_network"


@dataclass
class GradingKeys:
    """The network that grades patches, and the weights that it starts from."""

    trunk: str = key(
        "tf_efficientnet_lite0",
        "network below the average; small (stride 8 px), vgg16 (as published) or any timm model "
        "with maps",
    )
    init: str = key(
        "imagenet_lite0",
        "initial weights of the trunk; random, an encoder's name (imagenet_lite0, "
        "timm:<model>.<tag>) or a file",
    )
    norm: str = key(
        "batch", "normalisation of the trunk small; layer: the same for any batch", choices=NORMS
    )
    enlarged: bool = key(
        False,
        "enlarge a reduced image to full size first, as published: costs as much as a teacher",
    )
    removed_strides: int = key(
        0,
        "first halvings of the trunk that are taken out; log2(ratio) gives a student a map of its "
        "teacher's size",
        least=0,
    )
    normalised: bool = key(
        True, "pixels are normalised as the trunk's weights want them (published: false)"
    )


@dataclass(frozen=True)
class PatchScale:
    """Which pixels a network sees.

    Attributes:
        side: of a patch at full resolution, px.
        ratio: pixels at full resolution per pixel that is seen, along one side.
        mpp: um per px at full resolution; None: unknown.

    Raises:
        UserError: a ratio that does not divide the side.
    """

    side: int
    ratio: int = 1
    mpp: float | None = None

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.side < self.ratio or self.side % self.ratio:
            raise UserError(
                f"ratio={self.ratio}: expected a divisor of the side of patches, {self.side} px, "
                "so that pixels are averaged without rest"
            )

    @property
    def own_side(self) -> int:
        """Side of a patch as it is seen, px."""
        return self.side // self.ratio

    @property
    def own_mpp(self) -> float | None:
        """um per px that is seen."""
        return None if self.mpp is None else self.mpp * self.ratio


class GradingNetwork(NormalisedNetwork):
    """Patches in, maps, vectors and logits of the grades out.

    Args:
        keys: trunk and where its weights come from.
        grades: their names, in order.
        scale: the pixels that it sees.

    Raises:
        UserError: a trunk that cannot be had, or patches that are too small for it.
    """

    def __init__(self, keys: GradingKeys, grades: Sequence[str], scale: PatchScale) -> None:
        super().__init__()
        self.keys, self.grades, self.scale = keys, tuple(grades), scale
        self.trunk = build_trunk(keys.trunk, keys.init, keys.removed_strides, keys.norm)
        self.head = nn.Linear(self.trunk.width, len(self.grades))
        self.map_side = trace_shape(self.trunk, scale.side if keys.enlarged else scale.own_side)[-1]
        self.set_statistics(self.trunk.statistics)

    def forward(self, pixels: Float[Tensor, "b 3 h w"], level: int = LAST) -> GradingOutput:
        """Grade patches.

        Args:
            pixels: 0..1, at the network's own resolution.
            level: -1, or that of the earlier activations that come with the output; where no
                parameter needs a gradient (a teacher) the graph starts at them.
        """
        if self.keys.enlarged and self.scale.ratio > 1:
            size = [side * self.scale.ratio for side in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=True)
        if self.keys.normalised:
            pixels = self.normalise(pixels)
        if level == LAST:
            return self.grade_maps(self.trunk(pixels))
        with _catch(self.trunk.get_submodule(self.find_stage(level))) as caught:
            # not compiled: that would not call what has been added to a module since
            output = self.grade_maps(self.trunk.forward(pixels))
        return output._replace(inner=caught[0])

    def find_stage(self, level: int) -> str:
        """Name of the trunk's module whose output is a level's.

        Raises:
            UserError: the trunk has no such level.
        """
        stages = self.trunk.stages
        if not -len(stages) <= level < LAST:
            raise UserError(
                f"level={level}: expected -1 to {-len(stages)} for trunk={self.keys.trunk}"
            )
        return stages[level]

    def grade_maps(self, maps: Float[Tensor, "b k h w"]) -> GradingOutput:
        """The output that belongs to maps of the trunk, in fp32 at least."""
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        vectors = maps.mean(dim=(2, 3))
        logits = self.head(vectors)
        return GradingOutput(maps, vectors, logits.to(maps.dtype))

    def freeze(self) -> GradingNetwork:
        """Make it a teacher: in evaluation mode, without gradients, nothing kept for backward."""
        return self.requires_grad_(False).eval()

    def describe(self) -> dict[str, Any]:
        """What it takes to build this network again, for a checkpoint's `config`."""
        return {
            "kind": KIND,
            "network": asdict(self.keys),
            "scale": asdict(self.scale),
            "grades": list(self.grades),
            "statistics": self.statistics,
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> GradingNetwork:
        """The network that `describe` was called on, with random weights."""
        keys = GradingKeys(**{**description["network"], "init": RANDOM})
        network = cls(keys, description["grades"], PatchScale(**description["scale"]))
        network.set_statistics(description["statistics"])
        network.keys.init = description["network"]["init"]
        return network


def check_teacher(student: GradingNetwork, teacher: GradingNetwork, terms: ResolutionTerms) -> None:
    """Refuse a teacher that the student cannot learn from.

    Raises:
        UserError: other grades, other patches, less detail than the student sees; a trunk of
            another width, where a term compares channels; a level that one of both has not.
    """
    own, other = student.scale, teacher.scale
    if teacher.grades != student.grades:
        raise UserError(
            f"teacher: expected the grades {', '.join(student.grades)} in this order, found "
            f"{', '.join(teacher.grades)}"
        )
    if own.side != other.side or (None not in (own.mpp, other.mpp) and own.mpp != other.mpp):
        raise UserError(
            f"teacher: expected patches of {own.side} px at {own.mpp} um/px, found {other.side} px "
            f"at {other.mpp} um/px; train it on these patches"
        )
    if other.ratio > own.ratio:
        raise UserError(
            f"teacher: expected at least the student's detail (ratio {own.ratio}), found ratio "
            f"{other.ratio}"
        )
    widths = student.trunk.width, teacher.trunk.width
    if (terms.fm > 0 or terms.sr > 0) and widths[0] != widths[1]:
        raise UserError(
            "terms fm and sr: expected trunks of one width, found student {}, teacher {}; use kd "
            "or at_plus, or the teacher's trunk".format(*widths)
        )
    if terms.needs_inner():
        for network in (student, teacher):
            network.find_stage(terms.level)


@contextmanager
def _catch(module: nn.Module) -> Iterator[list[Tensor]]:
    """Outputs of a module while the context lasts, each part of a graph."""
    caught: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        caught.append(output if output.requires_grad else output.detach().requires_grad_())
        return caught[-1]

    handle = module.register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


def load_grading_network(path: str | Path) -> GradingNetwork:
    """A trained network from its checkpoint alone, in evaluation mode.

    Raises:
        UserError: the file is no checkpoint of a grading network.
    """
    content = load_checkpoint_of(path, KIND, "a grading network", "train_resolution_kd")
    described = content["config"]
    network = GradingNetwork.from_description(described)
    load_weights(network, content["model"], str(path))
    return network.eval()
