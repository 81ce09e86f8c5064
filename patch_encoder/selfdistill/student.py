"""The two networks of self-distillation: a student over views of several sizes, and its teacher.

Caron et al. (ICCV 2021), section 3.1 and figure 2: the same architecture twice, a backbone and a
projection head; the teacher is a moving average of the student (`wsi_common/ema.py`) and never gets
a gradient. Their state dicts have the keys `backbone.*` and `head.*` of DINO's files.
"""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.selfdistill.backbone import RANDOM, build_student_backbone
from patch_encoder.selfdistill.head import DINOHead


class SelfDistilled(nn.Module):
    """A backbone and a head over a list of views.

    Args:
        backbone: (B, C, H, W) -> (B, D) for every size of view.
        head: (N, D) -> (N, K).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(
        self, views: list[Float[Tensor, "_ _ _ _"]]
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n d"]]:
        """(logits (V * B, K), features (V * B, D)) in the order of the views.

        Views of one size share a pass of the backbone, and all share one of the head. A batch norm
        therefore sees all views of a size together, as in DINO.
        """
        places = defaultdict(list)
        for place, view in enumerate(views):
            places[view.shape[-2:]].append(place)
        features: dict[int, Tensor] = {}
        for members in places.values():
            stacked = self.backbone(torch.cat([views[place] for place in members]))
            parts = stacked.split([len(views[place]) for place in members])
            features |= dict(zip(members, parts, strict=True))
        ordered = torch.cat([features[place] for place in range(len(views))])
        return self.head(ordered), ordered


def build_student(
    arch: str,
    *,
    patch_size: int = 16,
    registers: int = 0,
    image_size: int = 224,
    drop_path: float = 0.1,
    init: str = RANDOM,
    out_dim: int = 65536,
    hidden_dim: int = 2048,
    bottleneck_dim: int = 256,
    batch_norm: bool = False,
    norm_last_layer: bool = True,
) -> SelfDistilled:
    """A student; the first arguments are those of `build_student_backbone`, the others of
    `DINOHead`.
    """
    backbone = build_student_backbone(
        arch,
        patch_size=patch_size,
        registers=registers,
        image_size=image_size,
        drop_path=drop_path,
        init=init,
    )
    head = DINOHead(
        backbone.num_features, out_dim, hidden_dim, bottleneck_dim, batch_norm, norm_last_layer
    )
    return SelfDistilled(backbone, head)


def make_teacher(student: SelfDistilled) -> SelfDistilled:
    """A copy with the student's weights, without gradients and without stochastic depth."""
    from timm.layers import DropPath

    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return teacher
