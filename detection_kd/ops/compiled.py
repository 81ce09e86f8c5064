"""The compiled op: loading it, and what torch has to know about it beside the kernels (shapes,
gradient, autocast).

The schema and the kernels are in `csrc`; `tools/build_ops.sh` builds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsi_common.ops.compiled_op import (
    CompiledOp,
    below_autocast,
    bound_of,
    compute_dtype,
    empty_gradients,
)

OPS = Path(__file__).resolve().parent
BACKWARD = "detection_kd::ms_deform_attn_backward"


def ms_deform_attn_compiled(
    value: Tensor, spatial_shapes: list[int], points: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator itself; see the schema in `csrc/cpu/binding.cpp`.

    Args:
        value: (B, S, heads, D).
        spatial_shapes: H0, W0, H1, W1, ...; symbolic while torch.compile traces, so that images of
            another size do not make it compile again.
        points: points of each level.
        locations: (B, Q, heads, sum of points, 2), float32 (float64 for float64 values).
        weights: (B, Q, heads, sum of points), the same dtype.

    Returns:
        (B, Q, heads * D) in the dtype of `value`.
    """
    return torch.ops.detection_kd.ms_deform_attn(value, spatial_shapes, points, locations, weights)


def _fake_forward(
    value: Tensor, spatial_shapes: list[int], points: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    points: list[int],
    locations: Tensor,
    weights: Tensor,
    bound: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(value, locations, weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, ctx.points, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    bound = bound_of(grad_out, value, weights)
    grad_value, grad_locations, grad_weights = torch.ops.detection_kd.ms_deform_attn_backward(
        grad_out, value, ctx.spatial_shapes, ctx.points, locations, weights, bound
    )
    return grad_value.to(value.dtype), None, None, grad_locations, grad_weights


def _autocast(
    value: Tensor, spatial_shapes: list[int], points: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """Values stay as they come; locations and weights are raised to the precision that the kernels
    compute in.
    """
    with below_autocast():
        dtype = compute_dtype(value)
        return ms_deform_attn_compiled(
            value, spatial_shapes, points, locations.to(dtype), weights.to(dtype)
        )


OP = CompiledOp(
    ops=OPS,
    namespace="detection_kd",
    name="ms_deform_attn",
    variable="DEFORM_ATTN_BACKEND",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    backward=_backward,
    autocast=_autocast,
)
unavailable, choose_kernels = OP.unavailable, OP.choose_kernels
