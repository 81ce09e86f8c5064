"""The compiled sparse attention op against dense maps and the reference: values, all gradients,
dtypes, instruction sets.

Every body that takes `device` runs on the CPU in the default suite and on CUDA under `-m gpu`.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks.sparse_attention import dense
from mil.ops import sparse_deform_attn as door
from mil.ops.compiled import BACKWARD, choose_kernels, unavailable
from mil.ops.grid import SparseMaps, build_grid
from mil.ops.sparse_deform_attn import sparse_deform_attn, takes_compiled
from tests.mil.ops.sparse_cases import Case, make_case, on, oracle, run, with_gradients
from wsi_common.errors import UserError
from wsi_common.ops.compiled_op import warn_once

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = ["avx512", "avx2", "baseline"]
DIMS = [1, 8, 30, 32, 71]


@pytest.fixture(autouse=True)
def _compiled_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if reason := unavailable("cpu"):
        pytest.fail(f"the suite runs on the compiled op: {reason}")
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "compiled")
    yield
    choose_kernels("auto")


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    """Pins one instruction set."""
    if choose_kernels(request.param) is None:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], limits: tuple[float, ...]) -> None:
    """Root mean square difference against the root mean square of what is wanted."""
    for a, b, limit in zip(found, wanted, limits, strict=True):
        a, b = a.detach().cpu().double(), b.detach()
        assert (a - b).square().mean().sqrt() <= limit * b.square().mean().sqrt() + 1e-13


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_reference_equals_dense_maps(renormalise: bool) -> None:
    case = make_case(4, 60, renormalise=renormalise)
    wanted = with_gradients(case, oracle(case))
    for found, exact in zip(with_gradients(case, run(case, "reference")), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_cpu_kernels_equal_the_reference(kernels: str, dim: int, renormalise: bool) -> None:
    case = make_case(dim, 37, renormalise=renormalise)
    wanted = with_gradients(case, run(case, "reference"))
    for found, exact in zip(with_gradients(case, run(case)), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)
    case = make_case(dim, 37, torch.float32, renormalise=renormalise)
    exact = case.doubled()
    close(
        with_gradients(case, run(case)), with_gradients(exact, run(exact, "reference")), (2e-6,) * 4
    )


@pytest.mark.parametrize(("dtype", "rms"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_16_bit_values_lose_only_their_own_precision(
    kernels: str, dtype: torch.dtype, rms: float
) -> None:
    case = make_case(71, 37, dtype)
    exact, found = case.doubled(), with_gradients(case, run(case))
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32, torch.float32]
    close(found, with_gradients(exact, run(exact, "reference")), (rms, rms, 1e-5, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.gpu
def test_cuda_kernels_equal_the_reference(
    dtype: torch.dtype, deterministic: bool, renormalise: bool, dim: int
) -> None:
    case = make_case(dim, 150, dtype, "cuda", renormalise)
    exact = case.doubled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found, again = with_gradients(case, run(case)), with_gradients(case, run(case))
    finally:
        torch.use_deterministic_algorithms(False)
    limit = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[
        dtype
    ]
    close(found, with_gradients(exact, run(exact, "reference")), (limit,) * 4)
    if deterministic:
        assert all(torch.equal(a, b) for a, b in zip(found, again))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradcheck(device: str, renormalise: bool) -> None:
    case = make_case(2, 5, device=device, renormalise=renormalise, levels=2, bags=2)

    def op(*leaves: Tensor) -> Tensor:
        return run(replace(case, value=leaves[0], locations=leaves[1], weights=leaves[2]))

    assert torch.autograd.gradcheck(
        op, case.leaves, atol=1e-6, eps=1e-6, fast_mode=device == "cuda"
    )


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_gradcheck_sees_any_gradient_that_is_lost(lost: int) -> None:
    case = make_case(1, 3, renormalise=True, levels=1, bags=2)

    def mutant(*leaves: Tensor) -> Tensor:
        kept = [
            leaf.detach() + 0 * leaf if place == lost else leaf for place, leaf in enumerate(leaves)
        ]
        return run(replace(case, value=kept[0], locations=kept[1], weights=kept[2]))

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(mutant, case.leaves, atol=1e-6, eps=1e-6)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's own
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    case = make_case(8, 5, dtype, device, levels=1, bags=2)
    arguments = (case.value, *case.index, case.points, case.locations, case.weights, True)
    torch.library.opcheck(torch.ops.mil.sparse_deform_attn, arguments)
    detached = [
        argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments
    ]
    grad = torch.randn(5, 24, device=device, dtype=dtype)
    torch.library.opcheck(torch.ops.mil.sparse_deform_attn_backward, (grad, *detached, None))
    assert BACKWARD == "mil::sparse_deform_attn_backward"


def test_a_second_derivative_is_an_error_and_not_zero() -> None:
    case = make_case(4, 5, levels=1, bags=2)

    def second(backend: str) -> Tensor:
        out = run(case, backend).pow(3).sum()
        (gradient,) = torch.autograd.grad(out, case.weights, create_graph=True)
        return torch.autograd.grad(gradient.sum(), case.value)[0]

    with pytest.raises(NotImplementedError, match="set SPARSE_ATTN_BACKEND=reference"):
        second("compiled")
    assert second("reference").abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own
@pytest.mark.parametrize("place", [0, 1, 2])
def test_forward_mode_is_an_error_and_not_zero(place: int) -> None:
    case = make_case(4, 5, levels=1, bags=2)
    inputs = [leaf.detach() for leaf in case.leaves]

    def call(leaf: Tensor) -> Tensor:
        value, locations, weights = [*inputs[:place], leaf, *inputs[place + 1 :]]
        return run(replace(case, value=value, locations=locations, weights=weights))

    leaf = inputs[place]
    with pytest.raises(NotImplementedError, match="set SPARSE_ATTN_BACKEND=reference"):
        torch.func.jvp(call, (leaf,), (torch.ones_like(leaf),))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="set SPARSE_ATTN_BACKEND=reference"),
    ):
        call(forward_ad.make_dual(leaf, torch.ones_like(leaf)))
    assert call(leaf).isfinite().all()  # and afterwards it is as before


ONE_GRAPH = """
import sys, torch
from mil.ops.grid import build_grid
from mil.ops.sparse_deform_attn import sparse_deform_attn

torch.manual_seed(0)
device = sys.argv[1]
index = build_grid([torch.tensor([[0, 0], [2, 0], [2, 2], [6, 4]])], 2, step=2).to(torch.device(device)).index
leaves = [torch.randn(int(index.maps.max()) + 1, 2, 8), 3 * torch.rand(4, 2, 2, 3, 2), torch.rand(4, 2, 2, 3)]
leaves = [leaf.to(device).requires_grad_() for leaf in leaves]

def function(v, x, a):
    return sparse_deform_attn(v * 2, index, x, a).relu()

compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
for out in (eager := function(*leaves)), (traced := compiled(*leaves)):
    torch.testing.assert_close(out, eager)
for a, b in zip(torch.autograd.grad(traced.sum(), leaves), torch.autograd.grad(eager.sum(), leaves)):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
print("one graph")
"""


@pytest.mark.process
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_one_graph(device: str, root: Path) -> None:
    # a process of its own: the shape checks of this suite wrap every function in what torch.compile
    # cannot trace
    command = [sys.executable, "-c", ONE_GRAPH, device]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "one graph" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_to_three_threads_agree_bit_for_bit(dtype: torch.dtype) -> None:
    case = make_case(32, 300, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(case, run(case)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_packed_bags_do_not_touch_each_other(device: str, renormalise: bool) -> None:
    case = make_case(8, 50, device=device, renormalise=renormalise)
    whole, start, cells = run(case), 0, 0
    for bag, count in enumerate(case.index.bags.tolist()):
        shapes = case.index.shapes[bag : bag + 1]
        size = int(shapes.prod(2).sum())
        index = SparseMaps(case.index.maps[cells : cells + size], shapes, torch.tensor([count]))
        part = slice(start, start + count)
        alone = run(
            replace(case, index=index, locations=case.locations[part], weights=case.weights[part])
        )
        assert torch.equal(alone, whole[part])
        start, cells = start + count, cells + size


@pytest.mark.parametrize("device", DEVICES)
def test_the_order_of_rows_does_not_matter(device: str) -> None:
    case = make_case(8, 50, torch.float32, device)
    order = torch.randperm(len(case.value), generator=torch.Generator().manual_seed(0)).to(device)
    place = order.argsort().int()
    maps = torch.where(case.index.maps < 0, -1, place[case.index.maps.long().clamp(min=0)])
    shuffled = replace(
        case,
        index=case.index._replace(maps=maps),
        value=case.value.detach()[order].requires_grad_(),
    )
    found, wanted = with_gradients(shuffled, run(shuffled)), with_gradients(case, run(case))
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(
        found[1], wanted[1][order]
    )  # rows of several maps interleave: one section
    assert torch.equal(found[2], wanted[2]) and torch.equal(found[3], wanted[3])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_several_maps_gets_the_gradients_of_all(device: str) -> None:
    index = SparseMaps(
        torch.tensor([0, 1, 1, 2], dtype=torch.int32),
        torch.tensor([[[1, 2]], [[2, 1]]]),
        torch.tensor([1, 1]),
    )
    value = torch.randn(3, 2, 4, dtype=torch.float64, device=device, requires_grad=True)
    locations = torch.tensor([[0.25, 0.0], [0.0, 0.25]], dtype=torch.float64, device=device)[
        :, None, None, None
    ]
    weights = torch.ones(2, 2, 1, 1, dtype=torch.float64, device=device)
    out = sparse_deform_attn(value, on(index, device), locations.expand(2, 2, 1, 1, 2), weights)
    torch.testing.assert_close(out[0], (0.75 * value[0] + 0.25 * value[1]).flatten())
    out.sum().backward()
    torch.testing.assert_close(
        value.grad[:, 0, 0].cpu(), torch.tensor([0.75, 1.0, 0.25], dtype=torch.float64)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_missing_cells_are_not_read_and_get_no_gradient(device: str, renormalise: bool) -> None:
    index = build_grid([torch.tensor([[0, 0], [2, 2]])], step=1).index  # two corners of 3 x 3 cells
    value = torch.full((4, 1, 2), float("inf"), device=device)  # rows 2 and 3: no map names them
    value[:2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, None]
    value.requires_grad_()
    at = torch.tensor(
        [[0.25, 0.0], [1.0, 1.0], [1.5, 1.5], [9.0, 9.0], [2.75, 2.0]], device=device
    )[:2, None, None, None]
    out = sparse_deform_attn(
        value,
        on(index, device)._replace(bags=torch.tensor([2])),
        at,
        torch.ones_like(at[..., 0]),
        renormalise=renormalise,
    )
    wanted = [[1.0, 2.0], [0.0, 0.0]] if renormalise else [[0.75, 1.5], [0.0, 0.0]]
    torch.testing.assert_close(out.cpu(), torch.tensor(wanted))
    out.sum().backward()
    assert value.grad[0, 0, 0] == (1.0 if renormalise else 0.75) and not value.grad[1:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_renormalised_locations_move_the_share_of_each_tile(device: str) -> None:
    index = build_grid(
        [torch.tensor([[0, 0], [1, 0], [1, 1]])], step=1
    ).index  # three of 2 x 2 cells
    value = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64, device=device).view(3, 1, 1)
    at = (
        torch.tensor([0.5, 0.5], dtype=torch.float64, device=device)
        .view(1, 1, 1, 1, 2)
        .requires_grad_()
    )
    out = sparse_deform_attn(
        value,
        on(index, device)._replace(bags=torch.tensor([1])),
        at,
        torch.ones_like(at[..., 0]),
        renormalise=True,
    )
    torch.testing.assert_close(out.item(), 4.0)  # (1 + 3 + 8) / 3
    out.backward()
    # (u / n)' = (u' - 4 n') / n with u = (1-x)(1-y) + 3 x(1-y) + 8 xy, n = 1 - (1-x)y = 0.75, n' =
    # (0.5, -0.5), u' = (5, 2)
    torch.testing.assert_close(
        at.grad.flatten().tolist(), [(5.0 - 4 * 0.5) / 0.75, (2.0 + 4 * 0.5) / 0.75]
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_locations_and_weights_in_float32(device: str, dtype: torch.dtype) -> None:
    case = make_case(32, 40, torch.float32, device)
    exact = run(case)
    with torch.autocast(device, dtype):
        low = run(replace(case, value=case.value.to(dtype)))
        direct = torch.ops.mil.sparse_deform_attn(
            case.value.to(dtype),
            *case.index,
            case.points,
            case.locations,
            case.weights.to(dtype),
            False,
        )
    assert low.dtype == direct.dtype == dtype
    for found in (low, direct):
        assert (found.float() - exact).square().mean().sqrt() < 5e-3 * exact.square().mean().sqrt()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(device: str, backend: str) -> None:
    for coords in (
        [],
        [torch.zeros(0, 2, dtype=torch.int64)],
        [torch.zeros(1, 2, dtype=torch.int64)],
    ):
        index = on(build_grid(coords, 2, step=1).index, device)._replace(
            bags=torch.zeros(len(coords), dtype=torch.int64)
        )
        value = torch.randn(3, 2, 5, device=device, requires_grad=True)
        locations = torch.rand(0, 2, 2, 4, 2, device=device, requires_grad=True)
        out = sparse_deform_attn(
            value, index, locations, torch.rand(0, 2, 2, 4, device=device), backend=backend
        )
        assert out.shape == (0, 10)
        out.sum().backward()
        assert value.grad.shape == value.shape and not value.grad.any()
    nothing = on(build_grid([torch.zeros(0, 2, dtype=torch.int64)], step=1).index, device)._replace(
        bags=torch.tensor([3])
    )
    out = sparse_deform_attn(
        value,
        nothing,
        torch.zeros(3, 2, 1, 4, 2, device=device),
        torch.ones(3, 2, 1, 4, device=device),
        backend=backend,
    )
    assert out.shape == (3, 10) and not out.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_what_is_not_finite(device: str, renormalise: bool, backend: str) -> None:
    index = on(build_grid([torch.tensor([[0, 0], [1, 0]])], step=1).index, device)
    value = torch.tensor([1.0, float("inf")], device=device).view(2, 1, 1)
    for x, wanted in (
        (-0.5, 1.0 if renormalise else 0.5),
        (3e9, 0.0),
        (-3e9, 0.0),
        (float("nan"), float("nan")),
        (float("inf"), float("nan")),
    ):
        at = torch.tensor([x, 0.0], device=device).expand(2, 1, 1, 1, 2)
        out = sparse_deform_attn(
            value,
            index,
            at,
            torch.ones(2, 1, 1, 1, device=device),
            renormalise=renormalise,
            backend=backend,
        )
        torch.testing.assert_close(out.cpu(), torch.full((2, 1), wanted), equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device: str) -> None:
    case = make_case(8, 10, device=device)
    odd = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in case.leaves]
    plain = run(case)
    assert not odd[0].is_contiguous()
    assert torch.equal(run(replace(case, value=odd[0], locations=odd[1], weights=odd[2])), plain)
    (full,) = torch.autograd.grad(plain, case.value, torch.ones_like(plain), retain_graph=True)
    (expanded,) = torch.autograd.grad(plain.sum(), case.value)  # its gradient has strides of 0
    assert torch.equal(full, expanded)


def test_wrong_inputs_are_errors_not_crashes() -> None:
    case = make_case(4, 10)
    value, index, locations, weights, points = (
        *case.leaves[:1],
        case.index,
        *case.leaves[1:],
        case.points,
    )
    with pytest.raises(ValueError, match="expected 3 levels with 9 points"):
        sparse_deform_attn(value, index, locations, weights, points[:2])
    wrong, low = index.maps.clone(), index.maps.clone()
    wrong[3], low[3] = len(value), -2
    op = torch.ops.mil.sparse_deform_attn
    for arguments, message in (
        ((value[0], *index, points, locations, weights), "expected value"),
        ((value, wrong, *index[1:], points, locations, weights), f"names row {len(value)}"),
        ((value, low, *index[1:], points, locations, weights), "names row -2"),
        (
            (value, index.maps.long(), *index[1:], points, locations, weights),
            "maps has another dtype",
        ),
        (
            (value, index.maps[1:], *index[1:], points, locations, weights),
            "maps does not have the shape",
        ),
        (
            (value, index.maps, index.shapes.int(), index.bags, points, locations, weights),
            "int64 tensor of 3",
        ),
        (
            (value, index.maps, index.shapes[:2], index.bags, points, locations, weights),
            "each of 3 bags",
        ),
        (
            (value, index.maps, index.shapes, index.bags + 1, points, locations, weights),
            "the bags have 13 queries",
        ),
        ((value, *index, [3, 5, 2], locations, weights), "the levels have 10 points"),
        ((value, *index, points, locations.float(), weights), "another dtype"),
        ((value, *index, points, locations[:, :2], weights), "locations does not have the shape"),
        (
            (value.long(), *index, points, locations, weights),
            "float32, float64, bfloat16 or float16",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, False)
    with pytest.raises(RuntimeError, match="names row"):
        grad = torch.ones(10, 12, dtype=torch.float64)
        torch.ops.mil.sparse_deform_attn_backward(
            grad, value, wrong, *index[1:], points, locations, weights, False, None
        )


def test_the_door_says_once_why_it_takes_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(door, "unavailable", lambda device_type: "it is not built")
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "auto")
    warn_once.cache_clear()
    case: Case = make_case(4, 5)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            run(case)
    assert len(caplog.records) == 1 and "it is not built" in caplog.text
    warn_once.cache_clear()
    with pytest.raises(UserError, match="backend=compiled: it is not built"):
        run(case, "compiled")
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "fast")
    with pytest.raises(
        UserError, match="SPARSE_ATTN_BACKEND=fast: expected one of auto, compiled, reference"
    ):
        takes_compiled("cpu")


def test_many_bags_in_one_batch() -> None:
    coords = [torch.tensor([[0, 0], [1, 0]])] * 300
    index = build_grid(coords, step=1).index
    value = torch.randn(600, 1, 4, dtype=torch.float64)
    at = torch.rand(600, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.ones(600, 1, 2, dtype=torch.float64)
    found = sparse_deform_attn(value, index, at, weights, [2])
    torch.testing.assert_close(found, dense(value, index, [2], at, weights))
