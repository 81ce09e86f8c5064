"""Multi-scale deformable attention as the benchmark calls it: inputs, the op, the `grid_sample`
form, rounds of both.

Shapes: the encoder of Deformable DETR on an 800 x 1066 image (batch 2, levels 100x134 ... 13x17, 8
heads of 32 channels, 4 points) and its decoder (300 queries). Locations: `local` as a trained
encoder has them (a normal of 3 cells around the query), `uniform` anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rounds import Call
from detection_kd.ops.compiled import ms_deform_attn_compiled
from detection_kd.ops.reference import ms_deform_attn_reference

LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]
BATCH, HEADS, DIM, POINTS = 2, 8, 32, 4
CASES = [("encoder", "local"), ("encoder", "uniform"), ("decoder", "local")]
Inputs = tuple[Tensor, Tensor, Tensor]
Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_inputs(shape: str, offsets: str, device: str) -> Inputs:
    """Value (N, S, M, D), locations (N, Q, M, L*P, 2), weights (N, Q, M, L*P), float32."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(height * width for height, width in LEVELS)
    if shape == "encoder":  # every cell is a query
        centres = torch.cat([_centres(height, width) for height, width in LEVELS]).expand(
            BATCH, -1, -1
        )
    else:
        centres = torch.rand(BATCH, 300, 2, generator=generator)
    size = (BATCH, centres.shape[1], HEADS, len(LEVELS), POINTS)
    if offsets == "uniform":
        locations = torch.rand(*size, 2, generator=generator)
    else:
        sizes = torch.tensor([(width, height) for height, width in LEVELS])[:, None]  # (L, 1, 2)
        locations = (
            centres[:, :, None, None, None] + 3 * torch.randn(*size, 2, generator=generator) / sizes
        )
    weights = torch.randn(size, generator=generator).flatten(3).softmax(-1)
    value = torch.randn(BATCH, cells, HEADS, DIM, generator=generator)
    return value.to(device), locations.flatten(3, 4).to(device), weights.to(device)


def _centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack((x / width, y / height), -1).flatten(0, 1)


def compiled(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The compiled op."""
    sizes = [size for shape in LEVELS for size in shape]
    return ms_deform_attn_compiled(value, sizes, [POINTS] * len(LEVELS), locations, weights)


def grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The form in use everywhere else on CPUs: one `grid_sample` a level."""
    return ms_deform_attn_reference(value, LEVELS, [POINTS] * len(LEVELS), locations, weights)


def contestant(function: Op, inputs: Inputs, what: str) -> Call:
    """One call of a pass: "forward", "backward" alone or "forward+backward"."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    if what != "backward":
        return forward if what == "forward" else both
    out = function(*leaves)
    ones = torch.ones_like(out)

    def backward() -> None:
        torch.autograd.grad(out, leaves, ones, retain_graph=True)

    return backward
