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
from mil.ops.grid import SparseMaps

OPS = Path(__file__).resolve().parent
FORWARD, BACKWARD = "mil::sparse_deform_attn", "mil::sparse_deform_attn_backward"
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


def sparse_deform_attn_compiled(
    value: Tensor, index: SparseMaps, points: list[int], locations: Tensor, weights: Tensor, renormalise: bool = False
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


def choose_kernels(name: str) -> str | None:
    """Pin the CPU kernels to "avx512", "avx2" or "baseline", for tests and measurements; "auto" undoes it.

    Returns:
        The name in force, None where this processor does not have it.
    """
    assert unavailable("cpu") is None
    choose = ctypes.CDLL(str(library_path(OPS, "cpu"))).sparse_deform_attn_choose_kernels
    choose.restype = ctypes.c_char_p
    found = choose(name.encode())
    return found.decode() if found else None


def _register() -> None:
    global _library
    torch.library.register_fake(FORWARD, _fake_forward)
    torch.library.register_fake(BACKWARD, _fake_backward)
    torch.library.register_autograd(FORWARD, _backward, setup_context=_save)
    _library = torch.library.Library("mil", "IMPL")
    for key in AUTOCAST_KEYS:
        _library.impl("sparse_deform_attn", _autocast, key)


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


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
    contiguous = torch.contiguous_format
    grad_value = torch.empty_like(value, dtype=_compute_dtype(value), memory_format=contiguous)
    return (
        grad_value,
        torch.empty_like(locations, memory_format=contiguous),
        torch.empty_like(weights, memory_format=contiguous),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, maps, shapes, bags, ctx.points, locations, weights, ctx.renormalise = inputs
    ctx.save_for_backward(value, maps, shapes, bags, locations, weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value, maps, shapes, bags, locations, weights = ctx.saved_tensors
    bound = None
    if value.is_cuda and torch.are_deterministic_algorithms_enabled() and grad_out.numel() and weights.numel():
        bound = grad_out.abs().amax().to(weights.dtype) * weights.abs().amax()
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
    """Values stay as they come; locations and weights are raised to the precision that the kernels compute in."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )
    with torch._C._ExcludeDispatchKeyGuard(keys):
        dtype, index = _compute_dtype(value), SparseMaps(maps, shapes, bags)
        return sparse_deform_attn_compiled(value, index, points, locations.to(dtype), weights.to(dtype), renormalise)
