"""The compiled op: loading it, and what torch has to know about it beside the kernels (shapes,
gradient, autocast).

The schema and the kernels are in `csrc`; `tools/build_ops.sh` builds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mil.ops.grid import SparseMaps
from wsi_common.ops.compiled_op import (
    CompiledOp,
    below_autocast,
    bound_of,
    compute_dtype,
    empty_gradients,
)

OPS = Path(__file__).resolve().parent
BACKWARD = "mil::sparse_deform_attn_backward"


def sparse_deform_attn_compiled(
    value: Tensor,
    index: SparseMaps,
    points: list[int],
    locations: Tensor,
    weights: Tensor,
    renormalise: bool = False,
) -> Tensor:
    """The operator itself; see the schema in `csrc/cpu/binding.cpp`.

    Args:
        value: (T, heads, D).
        index: maps on the device of `value`, shapes and bags on the host.
        points: points of each level.
        locations: (Q, heads, sum of points, 2), float32 (float64 for float64 values).
        weights: (Q, heads, sum of points), the same dtype.
        renormalise: divide by the bilinear weights of the corners that have a tile.

    Returns:
        (Q, heads * D) in the dtype of `value`.
    """
    return torch.ops.mil.sparse_deform_attn(value, *index, points, locations, weights, renormalise)


def _fake_forward(
    value: Tensor,
    maps: Tensor,
    shapes: Tensor,
    bags: Tensor,
    points: list[int],
    locations: Tensor,
    weights: Tensor,
    renormalise: bool,
) -> Tensor:
    return value.new_empty(locations.shape[0], value.shape[1] * value.shape[2])


def _fake_backward(
    grad_out: Tensor,
    value: Tensor,
    maps: Tensor,
    shapes: Tensor,
    bags: Tensor,
    points: list[int],
    locations: Tensor,
    weights: Tensor,
    renormalise: bool,
    bound: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(value, locations, weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, maps, shapes, bags, ctx.points, locations, weights, ctx.renormalise = inputs
    ctx.save_for_backward(value, maps, shapes, bags, locations, weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value, maps, shapes, bags, locations, weights = ctx.saved_tensors
    bound = bound_of(grad_out, value, weights)
    grad_value, grad_locations, grad_weights = torch.ops.mil.sparse_deform_attn_backward(
        grad_out, value, maps, shapes, bags, ctx.points, locations, weights, ctx.renormalise, bound
    )
    return grad_value.to(value.dtype), None, None, None, None, grad_locations, grad_weights, None


def _autocast(
    value: Tensor,
    maps: Tensor,
    shapes: Tensor,
    bags: Tensor,
    points: list[int],
    locations: Tensor,
    weights: Tensor,
    renormalise: bool,
) -> Tensor:
    """Values stay as they come; locations and weights are raised to the precision that the kernels
    compute in.
    """
    with below_autocast():
        dtype, index = compute_dtype(value), SparseMaps(maps, shapes, bags)
        return sparse_deform_attn_compiled(
            value, index, points, locations.to(dtype), weights.to(dtype), renormalise
        )


OP = CompiledOp(
    ops=OPS,
    namespace="mil",
    name="sparse_deform_attn",
    variable="SPARSE_ATTN_BACKEND",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    backward=_backward,
    autocast=_autocast,
)
unavailable, choose_kernels = OP.unavailable, OP.choose_kernels
