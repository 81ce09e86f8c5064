"""Several D2VFM students on one trunk: it runs once, then each student's pooling and adapter.

A student of layer2 and one of layer3 share the stages that both have: the trunk of the deepest
gives the maps of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from detection_kd.models.student import Student, StudentHead
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import Encoder, PixelEncoder


@dataclass(frozen=True)
class TrunkMember:
    """A student as an encoder (name, width, provenance) and as the network that it is."""

    encoder: Encoder
    student: Student


class SharedTrunk(PixelEncoder):
    """uint8 tiles (B, 3, H, W) -> features of all members side by side, (B, sum of their widths).

    Attributes:
        dims: width of each member's features.
        columns: where they stand in the output.
    """

    def __init__(self, members: Sequence[TrunkMember]) -> None:
        deepest = max(
            (member.student for member in members), key=lambda student: student.deepest_stage
        )
        super().__init__(deepest, IMAGENET)
        self.dims = [member.encoder.dim for member in members]
        ends = torch.tensor(self.dims).cumsum(0).tolist()
        self.columns = [slice(end - dim, end) for end, dim in zip(ends, self.dims, strict=True)]
        self._stages = [member.student.stages for member in members]
        self.heads = nn.ModuleList(StudentHead(member.student) for member in members)

    def forward(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """uint8 (B, 3, H, W) -> (B, D1 + D2 + ...)."""
        maps = self.network.all_maps(self.scaled(pixels))
        outputs = [
            head([maps[stage] for stage in stages])
            for head, stages in zip(self.heads, self._stages, strict=True)
        ]
        return torch.cat([output.float() for output in outputs], dim=1)


def group_by_trunk(members: Sequence[TrunkMember]) -> list[list[TrunkMember]]:
    """Group members of one input scale whose trunks are equal in the stages that they share."""
    groups: list[list[TrunkMember]] = []
    for member in sorted(members, key=lambda member: -member.student.deepest_stage):
        for group in groups:
            if _same_trunk(group[0].student, member.student):
                group.append(member)
                break
        else:
            groups.append([member])
    return groups


def _same_trunk(deeper: Student, other: Student) -> bool:
    if deeper.input_scale != other.input_scale:
        return False
    trunk, own = deeper.backbone.state_dict(), other.backbone.state_dict()
    return all(name in trunk and torch.equal(trunk[name], value) for name, value in own.items())
