"""The compiled attention op against the reference: values, all gradients, dtypes, instruction sets,
torch's own checks.

Every body that takes `device` runs on the CPU in the default suite and on CUDA under `-m gpu`.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from detection_kd.ops import ms_deform_attn as door
from detection_kd.ops.compiled import BACKWARD, OPS, choose_kernels, unavailable
from detection_kd.ops.gather import ms_deform_attn_gather
from detection_kd.ops.ms_deform_attn import ms_deform_attn, takes_compiled
from detection_kd.ops.reference import ms_deform_attn_reference
from wsi_common.errors import UserError
from wsi_common.ops.compiled_op import warn_once
from wsi_common.ops.native import Unit, build, cpu_units, library_path

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = ["avx512", "avx2", "baseline"]
DIMS = [1, 3, 4, 8, 30, 32, 64, 71, 256]
FEW, MANY = 5, 150  # queries: with many, the CPU kernels first copy a head's values side by side
Case = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor, list[int]]


@pytest.fixture(autouse=True)
def _compiled_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if reason := unavailable("cpu"):
        pytest.fail(f"the suite runs on the compiled op: {reason}")
    monkeypatch.setenv("DEFORM_ATTN_BACKEND", "compiled")
    yield
    choose_kernels("auto")


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    """Pins one instruction set."""
    if choose_kernels(request.param) is None:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def make_case(
    dim: int, queries: int, dtype: torch.dtype = torch.float64, device: str = "cpu", levels: int = 4
) -> Case:
    """A seeded case with ragged points, an empty level, maps that are not square and locations in
    [-0.5, 1.5].
    """
    torch.manual_seed(dim)
    rng = np.random.default_rng(dim)
    shapes = [(int(h), int(w)) for h, w in rng.integers(1, 9, (levels, 2))]
    points = [int(count) for count in rng.integers(1, 9, levels)]
    if levels > 2:
        shapes[2] = (0, 3)
    size = (2, queries, 3, sum(points))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(2, sum(h * w for h, w in shapes), 3, dim, dtype=torch.float64)
    locations = away_from_grid_lines(
        torch.rand(*size, 2, dtype=torch.float64) * 2 - 0.5, shapes, points
    )
    weights = torch.rand(size, dtype=torch.float64)
    tensors = (value.to(device, dtype), locations.to(device, real), weights.to(device, real))
    value, locations, weights = (tensor.requires_grad_() for tensor in tensors)
    return value, shapes, locations, weights, points


def away_from_grid_lines(
    locations: Tensor, shapes: list[tuple[int, int]], points: list[int]
) -> Tensor:
    """Nudge locations that lie within 0.01 cells of a cell centre's row or column, where the
    gradient jumps.
    """
    sizes = torch.tensor(
        [(w, h) for (h, w), count in zip(shapes, points) for _ in range(count)], dtype=torch.float64
    )
    cells = locations * sizes - 0.5
    near = (cells - cells.round()).abs() < 0.01
    return torch.where(near, locations + 0.02 / sizes.clamp(min=1), locations)


def values_and_gradients(case: Case) -> tuple[Tensor, ...]:
    value, shapes, locations, weights, points = case
    out = ms_deform_attn(value, shapes, locations, weights, points)
    weighting = (
        (torch.arange(out.numel(), device=out.device) % 7 - 3).view(out.shape).to(out)
    )  # exact in every dtype
    return out, *torch.autograd.grad(out, (value, locations, weights), weighting)


def expected(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """The reference in float64 on the very same numbers."""
    value, shapes, locations, weights, points = case
    exact = [tensor.detach().double().requires_grad_() for tensor in (value, locations, weights)]
    with monkeypatch.context() as patch:
        patch.setenv("DEFORM_ATTN_BACKEND", "reference")
        return values_and_gradients((exact[0], shapes, exact[1], exact[2], points))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("queries", [FEW, MANY])
def test_cpu_kernels_equal_the_reference(
    kernels: str, dim: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(dim, queries)
    for found, wanted in zip(values_and_gradients(case), expected(case, monkeypatch)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    case = make_case(dim, queries, torch.float32)
    for found, wanted in zip(values_and_gradients(case), expected(case, monkeypatch)):
        torch.testing.assert_close(
            found.double(), wanted, rtol=1e-5, atol=2e-6 * float(wanted.detach().abs().max())
        )


@pytest.mark.parametrize(("dtype", "rms"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("queries", [FEW, MANY])
def test_16_bit_values_lose_only_their_own_precision(
    kernels: str, dtype: torch.dtype, rms: float, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(71, queries, dtype)
    found, wanted = values_and_gradients(case), expected(case, monkeypatch)
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32, torch.float32]
    for a, b, limit in zip(found, wanted, (rms, rms, 1e-5, 1e-5)):
        assert (a.double() - b).square().mean().sqrt() < limit * b.square().mean().sqrt()


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.gpu
def test_cuda_kernels_equal_the_reference(
    device: str, dtype: torch.dtype, deterministic: bool, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(dim, MANY, dtype, device)
    with deterministic_algorithms(deterministic):
        found = values_and_gradients(case)
    limits = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
    for a, b in zip(found, expected(case, monkeypatch)):
        assert (a.double() - b).square().mean().sqrt() < limits[
            dtype
        ] * b.square().mean().sqrt() + 1e-12


class deterministic_algorithms:
    """`torch.use_deterministic_algorithms` for a while."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(self.on)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries", [2, 40])
def test_gradcheck(device: str, queries: int) -> None:
    value, shapes, locations, weights, points = make_case(4, queries, device=device, levels=2)
    fast = queries > 2

    def op(*tensors: Tensor) -> Tensor:
        return ms_deform_attn(tensors[0], shapes, tensors[1], tensors[2], points)

    assert torch.autograd.gradcheck(
        op, (value, locations, weights), atol=1e-6, eps=1e-6, fast_mode=fast
    )


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_gradcheck_sees_any_gradient_that_is_lost(lost: int) -> None:
    value, shapes, locations, weights, points = make_case(4, 2, levels=2)

    class Mutant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return ms_deform_attn(tensors[0], shapes, tensors[1], tensors[2], points)

        @staticmethod
        def backward(ctx, grad):
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                out = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2], points)
            found = list(torch.autograd.grad(out, leaves, grad))
            found[lost] = torch.zeros_like(found[lost])
            return tuple(found)

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(Mutant.apply, (value, locations, weights), atol=1e-6, eps=1e-6)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's own
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    value, shapes, locations, weights, points = make_case(8, 3, dtype, device, levels=2)
    sizes = [size for shape in shapes for size in shape]
    torch.library.opcheck(
        torch.ops.detection_kd.ms_deform_attn, (value, sizes, points, locations, weights)
    )
    grad = torch.randn(2, 3, 24, device=device, dtype=dtype)
    inputs = [tensor.detach() for tensor in (value, locations, weights)]
    arguments = (grad, inputs[0], sizes, points, *inputs[1:], None)
    torch.library.opcheck(torch.ops.detection_kd.ms_deform_attn_backward, arguments)
    assert BACKWARD == "detection_kd::ms_deform_attn_backward"


def test_a_second_derivative_is_an_error_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    value, shapes, locations, weights, points = make_case(4, 3, levels=2)

    def penalty() -> Tensor:
        out = ms_deform_attn(value, shapes, locations, weights, points)
        (gradient,) = torch.autograd.grad(out.square().sum(), locations, create_graph=True)
        return gradient.square().sum()

    with pytest.raises(NotImplementedError, match="set DEFORM_ATTN_BACKEND=reference"):
        torch.autograd.grad(penalty(), value)
    monkeypatch.setenv("DEFORM_ATTN_BACKEND", "reference")
    out = ms_deform_attn(value, shapes, locations, weights, points).pow(3).sum()
    (gradient,) = torch.autograd.grad(out, weights, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), weights)[0].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_an_error_and_not_zero(place: int, grad: bool) -> None:
    value, shapes, locations, weights, points = make_case(4, 3, levels=2)
    inputs = [leaf.detach().requires_grad_(grad) for leaf in (value, locations, weights)]

    def call(leaf: Tensor) -> Tensor:
        tensors = [*inputs[:place], leaf, *inputs[place + 1 :]]
        return ms_deform_attn(tensors[0], shapes, tensors[1], tensors[2], points)

    leaf = inputs[place]
    with pytest.raises(NotImplementedError, match="set DEFORM_ATTN_BACKEND=reference"):
        torch.func.jvp(call, (leaf,), (torch.ones_like(leaf),))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="set DEFORM_ATTN_BACKEND=reference"),
    ):
        call(forward_ad.make_dual(leaf, torch.ones_like(leaf)))
    assert call(leaf).isfinite().all()  # and afterwards it is as before


GRAPHS = """
import sys, torch
from torch._dynamo.backends.debugging import aot_eager
from detection_kd.ops.ms_deform_attn import ms_deform_attn

torch.manual_seed(0)
graphs = []

def count(graph, inputs):
    graphs.append(graph)
    return aot_eager(graph, inputs)

def function(v, shapes, x, a):
    return ms_deform_attn(v * 2, shapes, x, a).relu()

compiled = torch.compile(function, fullgraph=True, backend=count)
for side in (3, 5, 4, 9, 6, 7):
    shapes = [(side, side + 2), (side // 2, side)]
    cells = sum(height * width for height, width in shapes)
    leaves = [torch.randn(2, cells, 2, 8), torch.rand(2, 7, 2, 2, 3, 2), torch.rand(2, 7, 2, 2, 3)]
    v, x, a = leaves = [leaf.to(sys.argv[1]).requires_grad_() for leaf in leaves]
    eager, traced = function(v, shapes, x, a), compiled(v, shapes, x, a)
    torch.testing.assert_close(traced, eager)
    pairs = (torch.autograd.grad(out.sum(), leaves) for out in (traced, eager))
    for found, wanted in zip(*pairs):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
print(len(graphs), "graphs")
"""


@pytest.mark.process
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_one_graph_for_the_first_image_size_and_one_for_all_others(
    device: str, root: Path
) -> None:
    # a process of its own: the shape checks of this suite wrap every function in what torch.compile
    # cannot trace
    command = [sys.executable, "-c", GRAPHS, device]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "2 graphs\n", done.stderr[-3000:] + done.stdout


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_one_and_two_threads_agree_bit_for_bit(queries: int) -> None:
    case = make_case(32, queries, torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(case))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.gpu
def test_deterministic_cuda_backward_repeats_bit_for_bit() -> None:
    case = make_case(32, 2000, torch.float32, "cuda")
    with deterministic_algorithms(True):
        first = values_and_gradients(case)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, values_and_gradients(case)))


@pytest.mark.parametrize("device", DEVICES)
def test_samples_of_a_batch_do_not_touch_each_other(device: str) -> None:
    value, shapes, locations, weights, points = make_case(8, 21, device=device)
    whole = ms_deform_attn(value, shapes, locations, weights, points)
    parts = [
        ms_deform_attn(value[i : i + 1], shapes, locations[i : i + 1], weights[i : i + 1], points)
        for i in range(2)
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_locations_and_weights_in_float32(device: str, dtype: torch.dtype) -> None:
    value, shapes, locations, weights, points = make_case(32, 40, torch.float32, device)
    sizes = [size for shape in shapes for size in shape]
    exact = ms_deform_attn(value, shapes, locations, weights, points)
    with torch.autocast(device, dtype):
        low = ms_deform_attn(value.to(dtype), shapes, locations, weights, points)
        direct = torch.ops.detection_kd.ms_deform_attn(
            value.to(dtype), sizes, points, locations, weights.to(dtype)
        )
    assert low.dtype == direct.dtype == dtype
    for found in (low, direct):
        assert (found.float() - exact).square().mean().sqrt() < 5e-3 * exact.square().mean().sqrt()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(
    device: str, batch: int, queries: int
) -> None:
    value = torch.randn(batch, 15, 2, 3, requires_grad=True, device=device)
    locations = torch.rand(batch, queries, 2, 1, 2, 2, device=device, requires_grad=True)
    out = ms_deform_attn(
        value, [(3, 5)], locations, torch.rand(batch, queries, 2, 1, 2, device=device)
    )
    assert out.shape == (batch, queries, 6)
    out.sum().backward()
    assert value.grad.shape == value.shape and not value.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries", [1, 200])
def test_no_points_give_zeros(device: str, queries: int) -> None:
    value = torch.randn(1, 6, 2, 3, device=device)
    locations, weights = (
        torch.rand(1, queries, 2, 0, 2, device=device),
        torch.rand(1, queries, 2, 0, device=device),
    )
    out = ms_deform_attn(value, [(2, 3)], locations, weights, [0])
    assert out.shape == (1, queries, 6) and not out.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries", [1, 200])
def test_what_is_not_finite(device: str, queries: int) -> None:
    value = torch.full((1, 6, 1, 4), float("inf"), device=device)
    value[:, 4] = 1  # the cell (1, 1) of a 2 x 3 map
    centre = torch.tensor([0.5, 0.75], device=device).expand(1, queries, 1, 1, 1, 2).clone()
    weights = torch.ones(1, queries, 1, 1, 1, device=device)
    far = centre + 3e9
    assert not ms_deform_attn(
        value, [(2, 3)], far, weights
    ).any()  # infinite values outside are not read
    for bad in (float("nan"), float("inf"), -float("inf")):
        centre[..., 0] = bad
        assert ms_deform_attn(value, [(2, 3)], centre, weights).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_neighbours_of_weight_zero_outside_the_map(device: str) -> None:
    value = torch.full((1, 2, 1, 1), 2.0, device=device)
    value[0, 1] = float("inf")  # the only cell of the second level
    corner = torch.tensor([-0.25, 0.5], device=device).expand(
        1, 1, 1, 1, 1, 2
    )  # 0.75 cells left of the only centre
    locations = torch.cat((corner, corner - 9), 3)
    out = ms_deform_attn(
        value, [(1, 1), (1, 1)], locations, torch.ones(1, 1, 1, 2, 1, device=device)
    )
    torch.testing.assert_close(out, torch.full((1, 1, 1), 0.5, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device: str) -> None:
    value, shapes, locations, weights, points = make_case(8, 5, device=device)
    odd = [
        tensor.transpose(0, 1).contiguous().transpose(0, 1)
        for tensor in (value, locations, weights)
    ]
    assert not odd[0].is_contiguous()
    plain = ms_deform_attn(value, shapes, locations, weights, points)
    assert torch.equal(ms_deform_attn(odd[0], shapes, odd[1], odd[2], points), plain)
    (dense,) = torch.autograd.grad(plain, value, torch.ones_like(plain), retain_graph=True)
    (expanded,) = torch.autograd.grad(plain.sum(), value)  # its gradient has strides of 0
    assert torch.equal(dense, expanded)


@pytest.mark.gpu
def test_other_streams_and_devices() -> None:
    case = make_case(32, 50, torch.float32, "cuda")
    plain = values_and_gradients(case)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = values_and_gradients(case)
        torch.cuda.current_stream().synchronize()
    torch.testing.assert_close(other[0], plain[0])
    if torch.cuda.device_count() > 1:
        torch.testing.assert_close(
            values_and_gradients(make_case(32, 50, torch.float32, "cuda:1"))[0].to("cuda:0"),
            plain[0],
        )


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_values_on_cuda() -> None:
    side = 3000
    value = torch.zeros(1, side * side, 8, 32, device="cuda", dtype=torch.bfloat16)
    value[0, -1] = 1
    locations = torch.full((1, 1, 8, 1, 1, 2), 1 - 0.5 / side, device="cuda")
    out = ms_deform_attn(value, [(side, side)], locations, torch.ones(1, 1, 8, 1, 1, device="cuda"))
    torch.testing.assert_close(
        out.float(), torch.ones_like(out, dtype=torch.float32), atol=1e-2, rtol=0
    )


def test_wrong_inputs_are_errors_not_crashes() -> None:
    value, shapes, locations, weights, points = make_case(4, 3)
    with pytest.raises(ValueError, match="expected 4 levels"):
        ms_deform_attn(value, shapes[:3], locations, weights, points)
    sizes = [size for shape in shapes for size in shape]
    op = torch.ops.detection_kd.ms_deform_attn
    for arguments, message in (
        ((value, sizes[:-1], points, locations, weights), "height and width"),
        ((value[0], sizes, points, locations, weights), "expected value"),
        ((value, [size + 1 for size in sizes], points, locations, weights), "cells"),
        ((value, sizes, [count + 1 for count in points], locations, weights), "points"),
        ((value, sizes, points, locations[:, :2], weights), "weights does not have the shape"),
        ((value, sizes, points, locations.float(), weights), "another dtype"),
        (
            (value.long(), sizes, points, locations, weights),
            "float32, float64, bfloat16 or float16",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_the_door_says_once_why_it_takes_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(door, "unavailable", lambda device_type: "it is not built")
    monkeypatch.setenv("DEFORM_ATTN_BACKEND", "auto")
    warn_once.cache_clear()
    value, shapes, locations, weights, points = make_case(4, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ms_deform_attn(value, shapes, locations, weights, points)
    assert len(caplog.records) == 1 and "it is not built" in caplog.text
    warn_once.cache_clear()
    monkeypatch.setenv("DEFORM_ATTN_BACKEND", "compiled")
    with pytest.raises(UserError, match="it is not built"):
        ms_deform_attn(value, shapes, locations, weights, points)
    monkeypatch.setenv("DEFORM_ATTN_BACKEND", "fast")
    with pytest.raises(UserError, match="expected one of auto, compiled, reference"):
        takes_compiled("cpu")


@pytest.mark.process
def test_building_again_from_anywhere_does_nothing(tmp_path: Path, root: Path) -> None:
    library = library_path(OPS, "cpu")
    before = library.stat().st_mtime_ns
    command = ["bash", str(root / "tools" / "build_ops.sh"), "cuda=no"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0 and "up to date" in done.stderr, done.stderr
    assert library.stat().st_mtime_ns == before
    assert library.with_suffix(".log").stat().st_size > 100
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(UserError, match="expected one of /no/such/compiler, found none"):
        cpu_units(OPS)


def test_a_build_that_fails_says_where_its_log_is_and_leaves_no_library(tmp_path: Path) -> None:
    ops = tmp_path / "package" / "ops"
    (ops / "csrc" / "cpu").mkdir(parents=True)
    (ops / "csrc" / "cpu" / "broken.cpp").write_text("int main( {\n")
    units = cpu_units(ops)
    assert [unit.source.name for unit in units] == ["broken.cpp"] and isinstance(units[0], Unit)
    with pytest.raises(UserError, match="error: .*whole log"):
        build(ops, "cpu", units)
    assert not library_path(ops, "cpu").exists()
    assert "broken.cpp" in library_path(ops, "cpu").with_suffix(".log").read_text()


@pytest.mark.parametrize("shapes", [[(3, 5)], [(4, 6), (2, 3), (1, 1)]])
def test_gather_form_equals_the_reference(shapes: list[tuple[int, int]]) -> None:
    """The exported form, inside the levels, on their borders and outside of them."""
    generator = torch.Generator().manual_seed(3)
    cells, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(2, cells, 3, 4, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 7, 3, levels, 5, 2, generator=generator, dtype=torch.float64)
    locations = locations * 1.6 - 0.3
    locations[:, 0] = 0.0
    locations[:, 1] = 1.0
    weights = torch.rand(2, 7, 3, levels, 5, generator=generator, dtype=torch.float64)
    flat = locations.flatten(3, 4), weights.flatten(3, 4)
    wanted = ms_deform_attn_reference(value, shapes, [5] * levels, *flat)
    found = ms_deform_attn_gather(value, shapes, locations, weights)
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-12)
