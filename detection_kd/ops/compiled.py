"""The compiled op: loading it, and what torch has to know about it beside the kernels (shapes, gradient, autocast).

The schema and the kernels are in `csrc`; `tools/build_ops.sh` builds them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.native import library_path, load_library

OPS = Path(__file__).resolve().parent
FORWARD, BACKWARD = "detection_kd::ms_deform_attn", "detection_kd::ms_deform_attn_backward"
AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")
_library: torch.library.Library | None = None  # registrations live as long as this does


@cache
def unavailable(device_type: str) -> str | None:
    """Why the compiled op cannot run on "cpu" or "cuda"; None where it can. Loads it on the first call."""
    if device_type not in {"cpu", "cuda"}:
        return f"there is no compiled kernel for {device_type}"
    if device_type == "cuda":
        return unavailable("cpu") or load_library(library_path(OPS, "cuda"))
    reason = load_library(library_path(OPS, "cpu"))
    if reason is None:
        _register()
    return reason


def ms_deform_attn_compiled(
    value: Tensor, spatial_shapes: list[int], points: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator itself; see the schema in `csrc/cpu/binding.cpp`.

    Args:
        value: (B, S, heads, D).
        spatial_shapes: H0, W0, H1, W1, ...
        points: points of each level.
        locations: (B, Q, heads, sum of points, 2), float32 (float64 for float64 values).
        weights: (B, Q, heads, sum of points), the same dtype.

    Returns:
        (B, Q, heads * D) in the dtype of `value`.
    """
    return torch.ops.detection_kd.ms_deform_attn(value, spatial_shapes, points, locations, weights)


def choose_kernels(name: str) -> str | None:
    """Pin the CPU kernels to "avx512", "avx2" or "baseline", for tests and measurements; "auto" undoes it.

    Returns:
        The name in force, None where this processor does not have it.
    """
    assert unavailable("cpu") is None
    choose = ctypes.CDLL(str(library_path(OPS, "cpu"))).deform_attn_choose_kernels
    choose.restype = ctypes.c_char_p
    found = choose(name.encode())
    return found.decode() if found else None


def _register() -> None:
    global _library
    torch.library.register_fake(FORWARD, _fake_forward)
    torch.library.register_fake(BACKWARD, _fake_backward)
    torch.library.register_autograd(FORWARD, _backward, setup_context=_save)
    _library = torch.library.Library("detection_kd", "IMPL")
    for key in AUTOCAST_KEYS:
        _library.impl("ms_deform_attn", _autocast, key)


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _fake_forward(value: Tensor, spatial_shapes: list[int], points: list[int], locations: Tensor, weights: Tensor) -> Tensor:
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
    contiguous = torch.contiguous_format
    grad_value = torch.empty_like(value, dtype=_compute_dtype(value), memory_format=contiguous)
    return (
        grad_value,
        torch.empty_like(locations, memory_format=contiguous),
        torch.empty_like(weights, memory_format=contiguous),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, ctx.points, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    bound = None
    if value.is_cuda and torch.are_deterministic_algorithms_enabled() and grad_out.numel() and weights.numel():
        bound = grad_out.abs().amax().to(weights.dtype) * weights.abs().amax()
    grad_value, grad_locations, grad_weights = torch.ops.detection_kd.ms_deform_attn_backward(
        grad_out, value, ctx.spatial_shapes, ctx.points, locations, weights, bound
    )
    return grad_value.to(value.dtype), None, None, grad_locations, grad_weights


def _autocast(value: Tensor, spatial_shapes: list[int], points: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Values stay as they come; locations and weights are raised to the precision that the kernels compute in."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )
    with torch._C._ExcludeDispatchKeyGuard(keys):
        dtype = _compute_dtype(value)
        return ms_deform_attn_compiled(value, spatial_shapes, points, locations.to(dtype), weights.to(dtype))
