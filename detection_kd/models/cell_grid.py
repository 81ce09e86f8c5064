"""Where the cells of a map lie in the picture that it is made from.

A cell sees a receptive field, whose middle is where the cell is. It is not the middle of the cell's
share of the picture: symmetric padding moves it up and left by half of every stride less half a
pixel (resnet18 up to stage 3: 7.5 px), and padding as TensorFlow's down and right, by as much as
the side of the picture asks for. Source of the arithmetic: Araujo et al., Computing receptive
fields of convolutional neural networks, Distill 2019. Difference: the middle is measured, on a
network that only averages, so that trunks with branches have one, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_common.errors import UserError

STRIP = 64  # px; a multiple of every trunk's stride
LENGTH = 1024  # px at least; the cell in the middle sees neither end
FAINT = 1e-3  # value of the pixels: gates and activations that saturate are straight there
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class CellGrid(NamedTuple):
    """Cells of a map: cell i has its middle at `(i + 0.5) * stride + offset`, along x and along y.

    Attributes:
        stride: from cell to cell, px.
        offset: of a cell's middle from the middle of its share of the picture, px.
    """

    stride: float
    offset: float = 0.0

    def scale(self, factor: float) -> CellGrid:
        """The same cells in a unit of which there are `factor` to a px."""
        return CellGrid(self.stride * factor, self.offset * factor)


def measure_cells(trunk: nn.Module, side: int) -> CellGrid:
    """Cells of a trunk's maps of square tiles.

    Args:
        trunk: pixels (B, 3, H, W) to maps, on the CPU; it is of no use afterwards, since its
            weights become averages.
        side: of a tile, px; padding may depend on it.

    Raises:
        UserError: a max pool whose padding is unknown.
    """
    make_averaging(trunk).eval()
    # what is left over when this length is halved is what is left over of a tile
    length = side % STRIP + LENGTH
    pixels = torch.full((1, 3, STRIP, length), FAINT, requires_grad=True)
    maps = trunk(pixels)
    stride, middle = float(round(length / maps.shape[-1])), maps.shape[-1] // 2
    (seen,) = torch.autograd.grad(maps[..., middle].sum(), pixels)
    along = seen.sum((0, 1, 2)).double()  # (length,)
    place = float((along * (torch.arange(length) + 0.5)).sum() / along.sum())
    return CellGrid(stride, round(place - (middle + 0.5) * stride, 2))


def takes_patches(network: nn.Module) -> bool:
    """Whether a network cuts its input into patches without overlap, as transformers do: a cell is
    then where its patch is, however far attention looks.
    """
    proj = getattr(getattr(network, "patch_embed", None), "proj", None)
    return isinstance(proj, nn.Conv2d) and proj.kernel_size == proj.stride


def make_averaging(network: nn.Module) -> nn.Module:
    """Change a network so that each output is an average of its inputs."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(_pool_mean)
        elif isinstance(module, NORMS):
            module.register_forward_hook(_pass_through)
    return network


def _pass_through(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    """The input: a norm of equal channels is 0 and has no gradient."""
    return inputs[0]


def _pool_mean(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """The mean, since the maximum of equal values is the first of them."""
    sizes = (module.kernel_size, module.stride, module.padding)
    found = functional.avg_pool2d(inputs[0], *sizes, ceil_mode=module.ceil_mode)
    if found.shape != output.shape:
        raise UserError(
            f"network.trunk: expected max pools that pad alike on all sides, found "
            f"{type(module).__name__}; choose another"
        )
    return found
