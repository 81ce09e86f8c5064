"""The CUDA kernels of the sparse attention op, run thread by thread on the CPU against the
reference.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mil.ops.compiled import OPS
from tests.cuda_on_host import build_for_host
from tests.mil.ops.sparse_cases import Case, make_case, run, with_gradients
from wsi_common.ops.native import SHARED

pytestmark = pytest.mark.process

MAX_LEVELS, MAX_MAPS = 16, 128
ENTRY = """
template <class S, class Real>
int launch_entry(const deform_attn::CudaCall<S, Real>* call, int what) {
  if (what == 2) return deform_attn::launch_from_fixed(*call, nullptr);
  return what == 1 ? deform_attn::launch_backward(*call, nullptr) : deform_attn::launch_forward(*call, nullptr);
}
extern "C" int launch_float32(const deform_attn::CudaCall<float, float>* c, int w) { return launch_entry(c, w); }
extern "C" int launch_bfloat16(const deform_attn::CudaCall<__nv_bfloat16, float>* c, int w) { return launch_entry(c, w); }
"""


class Bags(ctypes.Structure):
    """`Bags` of `launch.h`."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("count", "levels")),
        ("first_query", ctypes.c_int64),
        ("end", ctypes.c_int64 * MAX_MAPS),
        *((name, ctypes.c_int * MAX_MAPS) for name in ("height", "width", "start")),
        ("point_end", ctypes.c_int * MAX_LEVELS),
    ]


POINTERS = (
    "maps",
    "value",
    "locations",
    "weights",
    "out",
    "grad_out",
    "grad_value",
    "grad_locations",
    "grad_weights",
)


class CudaCall(ctypes.Structure):
    """`CudaCall` of `launch.h`."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("heads", "dim", "points", "renormalise", "row_bytes")),
        ("bags", Bags),
        *((name, ctypes.c_void_p) for name in (*POINTERS, "fixed", "bound")),
        ("headroom", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, compiled for the host."""
    folder = OPS / "csrc" / "cuda"
    sources = [SHARED / "cuda_lanes.cuh", folder / "launch.h", folder / "kernels.cuh"]
    return ctypes.CDLL(
        str(build_for_host(sources, tmp_path_factory.mktemp("sparse") / "libsparse.so", ENTRY))
    )


def bags_of(case: Case, first: int, end: int) -> Bags:
    """Bags [first, end) as one launch takes them."""
    ends, levels = case.index.bags.cumsum(0).tolist(), len(case.points)
    bags = Bags(end - first, levels, ends[first - 1] if first else 0)
    start = int(case.index.shapes[:first].prod(2).sum())
    for bag in range(first, end):
        bags.end[bag - first] = ends[bag]
        for level, (height, width) in enumerate(case.index.shapes[bag].tolist()):
            place = (bag - first) * levels + level
            bags.height[place], bags.width[place], bags.start[place] = height, width, start
            start += height * width
    for level in range(levels):
        bags.point_end[level] = sum(case.points[: level + 1])
    return bags


def run_kernels(
    library: ctypes.CDLL, case: Case, grad: Tensor, deterministic: bool, at_once: int = 3
) -> tuple[Tensor, ...]:
    """Output and gradients of the kernels, called as `binding.cpp` calls them, `at_once` bags a
    launch.
    """
    value, locations, weights = (tensor.detach() for tensor in case.leaves)
    out = torch.full_like(grad, float("nan"))
    grads = (
        torch.zeros_like(value, dtype=torch.float32),
        torch.full_like(locations, torch.nan),
        torch.full_like(weights, torch.nan),
    )
    call = CudaCall(
        len(value), value.shape[1], value.shape[2], weights.shape[2], int(case.renormalise)
    )
    tensors = (case.index.maps, value, locations, weights, out, grad, *grads)
    for name, tensor in zip(POINTERS, tensors, strict=True):
        setattr(call, name, tensor.data_ptr())
    fixed = torch.zeros_like(value, dtype=torch.int64)
    bound = grad.abs().amax().float() * weights.abs().amax()
    if deterministic:
        call.fixed, call.bound = fixed.data_ptr(), bound.data_ptr()
        call.headroom = 62 - (weights.shape[0] * weights.shape[2]).bit_length()
    launch = getattr(library, f"launch_{str(value.dtype).removeprefix('torch.')}")
    for what in (0, 1):
        for first in range(0, len(case.index.bags), at_once):
            call.bags = bags_of(case, first, min(first + at_once, len(case.index.bags)))
            assert launch(ctypes.byref(call), what) == 0
    assert not deterministic or launch(ctypes.byref(call), 2) == 0
    return out, *grads


def check(
    library: ctypes.CDLL,
    case: Case,
    value: Tensor | None = None,
    deterministic: bool = False,
    at_once: int = 3,
) -> None:
    """The kernels, on `value` in place of the case's own, against the reference on the case."""
    exact = case.doubled()
    wanted = with_gradients(exact, run(exact, "reference"))
    grad = (torch.arange(wanted[0].numel()) % 7 - 3).view(wanted[0].shape).to(case.value.dtype)
    found = run_kernels(
        library, case if value is None else replace(case, value=value), grad, deterministic, at_once
    )
    low = 5e-3 if case.value.dtype == torch.bfloat16 else 3e-6
    for a, b, limit in zip(found, wanted, (low, 3e-6, 3e-6, 3e-6), strict=True):
        assert (
            a.double() - b.detach()
        ).square().mean().sqrt() <= limit * b.detach().square().mean().sqrt()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dim", [1, 8, 32, 71])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_kernels_equal_the_reference(
    library: ctypes.CDLL, dim: int, dtype: torch.dtype, renormalise: bool, deterministic: bool
) -> None:
    case = make_case(dim, 12, dtype, renormalise=renormalise)
    fenced = torch.full(
        (case.value.numel() + 128,), float("nan"), dtype=dtype
    )  # nothing beyond the rows may be read
    value = fenced[64:-64].view(case.value.shape).copy_(case.value.detach())
    value[-2:] = torch.nan  # nor rows that no map names
    check(library, case, value, deterministic)


@pytest.mark.parametrize("at_once", [1, 2])
def test_bags_may_take_several_launches(library: ctypes.CDLL, at_once: int) -> None:
    check(library, make_case(8, 20, torch.float32), at_once=at_once)


def test_values_that_start_anywhere_take_the_kernel_of_single_loads(library: ctypes.CDLL) -> None:
    case = make_case(32, 10, torch.float32, renormalise=True)
    odd = torch.empty(case.value.numel() + 1)[1:].view(case.value.shape).copy_(case.value.detach())
    assert odd.data_ptr() % 16
    check(library, case, odd)


def test_rows_beyond_the_values_are_not_read(library: ctypes.CDLL) -> None:
    case = make_case(8, 20, torch.float32)
    short = replace(case, value=case.value.detach()[:20].clone())
    maps = torch.where(case.index.maps < 20, case.index.maps, -1)
    honest = replace(
        short, index=case.index._replace(maps=maps), value=short.value.requires_grad_()
    )
    grad = torch.ones(20, 24)
    for a, b in zip(
        run_kernels(library, short, grad, False),
        run_kernels(library, honest, grad, False),
        strict=True,
    ):
        assert torch.equal(a, b)
