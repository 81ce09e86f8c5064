"""Batch norm whose statistics and parameters stay as they are, in the type of the map.

Source: frozen batch norm of DETR and Deformable DETR. timm and torchvision scale and shift a map by
float32 values in two passes, so that under autocast the map becomes float32 and the next
convolution has to convert it again. There, PyTorch's own batch norm in evaluation mode is the same
function in one pass, in the type of the map. It keeps its input for the gradient, which the two
passes do not, so that they stay for float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn
from torchvision.ops import misc


class FrozenBatchNorm2d(misc.FrozenBatchNorm2d):
    """torchvision's, in the type of the map."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map (B, C, H, W)."""
        return super().forward(x) if x.dtype == torch.float32 else _normalise(self, x)


class FrozenBatchNormAct2d(layers.FrozenBatchNormAct2d):
    """timm's with the activation that follows, in the type of the map."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map (B, C, H, W) and activate it."""
        if x.dtype == torch.float32:
            return super().forward(x)
        return self.act(self.drop(_normalise(self, x)))


def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
    values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return F.batch_norm(x, *values, training=False, eps=norm.eps)


def freeze_norms(module: nn.Module) -> nn.Module:
    """Replace every batch norm inside a module by a frozen one; names of the weights stay."""
    frozen = layers.freeze_batch_norm_2d(module)
    for inner in frozen.modules():
        if type(inner) is misc.FrozenBatchNorm2d:
            inner.__class__ = FrozenBatchNorm2d
        elif type(inner) is layers.FrozenBatchNormAct2d:
            inner.__class__ = FrozenBatchNormAct2d
    return frozen
