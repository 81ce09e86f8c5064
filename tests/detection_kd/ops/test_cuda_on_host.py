"""The CUDA kernels, ours and the classic ones of the benchmark, run thread by thread on the CPU
against the reference.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from benchmarks.classic_deform_attn import FOLDER as BENCHMARKS
from benchmarks.classic_deform_attn import ClassicAttention, load_kernels
from detection_kd.ops.compiled import OPS
from detection_kd.ops.reference import ms_deform_attn_reference
from tests.cuda_on_host import build_for_host
from wsi_common.ops.native import SHARED

pytestmark = pytest.mark.process

MAX_LEVELS = 16
Inputs = tuple[Tensor, Tensor, Tensor]
ENTRY = """
template <class S, class Real>
int launch_entry(const deform_attn::CudaCall<S, Real>* call, int backward) {
  return backward ? deform_attn::launch_backward(*call, nullptr) : deform_attn::launch_forward(*call, nullptr);
}
extern "C" int launch_float32(const deform_attn::CudaCall<float, float>* c, int b) { return launch_entry(c, b); }
extern "C" int launch_bfloat16(const deform_attn::CudaCall<__nv_bfloat16, float>* c, int b) { return launch_entry(c, b); }
"""


class Levels(ctypes.Structure):
    """`Levels` of `launch.h`."""

    _fields_ = [
        ("count", ctypes.c_int),
        *((name, ctypes.c_int * MAX_LEVELS) for name in ("height", "width", "start", "point_end")),
    ]


POINTERS = (
    "value",
    "locations",
    "weights",
    "out",
    "grad_out",
    "grad_value",
    "grad_locations",
    "grad_weights",
    "fixed",
    "bound",
)


class CudaCall(ctypes.Structure):
    """`CudaCall` of `launch.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "cells", "queries")),
        *((name, ctypes.c_int) for name in ("heads", "dim", "points", "row_bytes")),
        ("levels", Levels),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("headroom", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels of the op."""
    folder = OPS / "csrc" / "cuda"
    library = tmp_path_factory.mktemp("ours") / "libours.so"
    return ctypes.CDLL(
        str(
            build_for_host(
                [SHARED / "cuda_lanes.cuh", folder / "launch.h", folder / "kernels.cuh"],
                library,
                ENTRY,
            )
        )
    )


@pytest.fixture(scope="module")
def classic(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels of the benchmark."""
    source = BENCHMARKS / "csrc" / "classic_ms_deform_attn.cu"
    return load_kernels(
        build_for_host([source], tmp_path_factory.mktemp("classic") / "libclassic.so")
    )


def make_inputs(
    dim: int, shapes: list[tuple[int, int]], points: list[int], dtype: torch.dtype, queries: int = 7
) -> Inputs:
    """2 samples, 3 heads, locations in [-0.5, 1.5] and some on the borders; around the values lie
    NaNs that none may read.
    """
    generator = torch.Generator().manual_seed(dim)
    size = (2, sum(height * width for height, width in shapes), 3, dim)
    count, fence = torch.Size(size).numel(), 64
    fenced = torch.full((count + 2 * fence,), float("nan"), dtype=dtype)
    value = fenced[fence:-fence].view(size)
    value.copy_(torch.randn(size, generator=generator))
    locations = torch.rand(2, queries, 3, sum(points), 2, generator=generator) * 2 - 0.5
    locations[0, 0, 0, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    locations[1, 0, 0, :1] = 3e9
    weights = torch.rand(2, queries, 3, sum(points), generator=generator)
    return value, locations, weights


def expected(
    inputs: Inputs, shapes: list[tuple[int, int]], points: list[int], grad: Tensor
) -> tuple[Tensor, ...]:
    """Output and gradients of the reference in float64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = ms_deform_attn_reference(exact[0], shapes, points, exact[1], exact[2])
    return out.detach(), *torch.autograd.grad(out, exact, grad.double())


def run_ours(
    library: ctypes.CDLL,
    inputs: Inputs,
    shapes: list[tuple[int, int]],
    points: list[int],
    grad: Tensor,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    """Output and gradients of our kernels, called as `binding.cpp` calls them."""
    value, locations, weights = inputs
    out = torch.empty(2, locations.shape[1], 3 * value.shape[3], dtype=value.dtype)
    grads = (
        torch.zeros_like(value, dtype=locations.dtype),
        torch.empty_like(locations),
        torch.empty_like(weights),
    )
    fixed = torch.zeros_like(value, dtype=torch.int64)
    bound = grad.abs().amax().to(weights.dtype) * weights.abs().amax()
    tensors = (value, locations, weights, out, grad, *grads, fixed, bound)
    call = CudaCall(2, value.shape[1], locations.shape[1], 3, value.shape[3], sum(points))
    call.headroom = 62 - (locations.shape[1] * sum(points)).bit_length()
    call.levels.count = len(shapes)
    start = end = 0
    for level, ((height, width), count) in enumerate(zip(shapes, points)):
        end += count
        for name, number in (
            ("height", height),
            ("width", width),
            ("start", start),
            ("point_end", end),
        ):
            getattr(call.levels, name)[level] = number
        start += height * width
    for name, tensor in zip(POINTERS, tensors):
        if deterministic or name not in {"fixed", "bound"}:
            setattr(call, name, tensor.data_ptr())
    launch = getattr(library, f"launch_{str(value.dtype).removeprefix('torch.')}")
    assert launch(ctypes.byref(call), 0) == 0 and launch(ctypes.byref(call), 1) == 0
    return out, *grads


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], limits: tuple[float, ...]) -> None:
    for a, b, limit in zip(found, wanted, limits):
        assert (a.detach().double() - b).square().mean().sqrt() <= limit * b.square().mean().sqrt()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [1, 8, 32, 71, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_kernels_equal_the_reference(
    ours: ctypes.CDLL, dim: int, dtype: torch.dtype, deterministic: bool
) -> None:
    shapes, points = [(5, 7), (3, 2), (0, 3), (1, 1)], [4, 13, 2, 1]
    inputs = make_inputs(dim, shapes, points, dtype)
    grad = torch.randn(2, 7, 3 * dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = run_ours(ours, inputs, shapes, points, grad, deterministic)
    low = 5e-3 if dtype == torch.bfloat16 else 2e-6
    close(found, expected(inputs, shapes, points, grad), (low, 2e-6, 2e-6, 2e-6))


@pytest.mark.parametrize("deterministic", [False, True])
def test_values_that_start_anywhere_take_the_kernel_of_single_loads(
    ours: ctypes.CDLL, deterministic: bool
) -> None:
    shapes, points = [(4, 4)], [4]
    value, locations, weights = make_inputs(32, shapes, points, torch.float32)
    odd = torch.empty(value.numel() + 1)[1:].view(value.shape).copy_(value)
    assert odd.data_ptr() % 16
    grad = torch.ones(2, 7, 96)
    found = run_ours(ours, (odd, locations, weights), shapes, points, grad, deterministic)
    close(found, expected((value, locations, weights), shapes, points, grad), (2e-6,) * 4)


def test_fixed_point_sums_do_not_overflow_where_everything_falls_on_one_cell(
    ours: ctypes.CDLL,
) -> None:
    shapes, points = [(1, 1)], [18]
    value = torch.ones(2, 1, 3, 4)
    locations, weights = torch.full((2, 7, 3, 18, 2), 0.5), torch.full((2, 7, 3, 18), 1.75)
    grad = torch.full((2, 7, 12), 1.99)
    found = run_ours(ours, (value, locations, weights), shapes, points, grad, deterministic=True)
    torch.testing.assert_close(found[1], torch.full_like(value, 7 * 18 * 1.75 * 1.99))


@pytest.mark.parametrize("deterministic", [False, True])
def test_levels_that_are_all_empty_give_zeros(ours: ctypes.CDLL, deterministic: bool) -> None:
    shapes, points = [(0, 3), (2, 0)], [2, 2]
    inputs = make_inputs(8, shapes, points, torch.float32)
    found = run_ours(ours, inputs, shapes, points, torch.ones(2, 7, 24), deterministic)
    assert not any(tensor.any() for tensor in found)


def test_the_classic_kernels_equal_the_reference(classic: ctypes.CDLL) -> None:
    shapes, points = [(5, 7), (3, 2), (1, 1)], [4, 4, 4]
    inputs = make_inputs(32, shapes, points, torch.float32)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = ClassicAttention(classic, shapes, 4, "cpu")(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = (out, *torch.autograd.grad(out, leaves, grad))
    close(found, expected(inputs, shapes, points, grad), (2e-6,) * 4)


def test_the_classic_backward_refuses_other_widths(classic: ctypes.CDLL) -> None:
    inputs = make_inputs(8, [(2, 2)], [4], torch.float32)
    op = ClassicAttention(classic, [(2, 2)], 4, "cpu")
    with pytest.raises(RuntimeError, match="classic_backward: invalid"):
        op.backward(op.forward(*inputs), *inputs)
