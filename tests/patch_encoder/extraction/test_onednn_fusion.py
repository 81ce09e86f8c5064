"""Fused networks against the networks themselves: kinds of layers, sums that must not be written
over, what cannot be fused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from patch_encoder.extraction import onednn_fusion as fused_network
from patch_encoder.extraction.network import Network, fold_batch_norms
from patch_encoder.extraction.onednn_fusion import FusedNetwork, choose_fastest, fuse_network
from patch_encoder.models.encoders import build_encoder

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)
CONVOLUTION, SUM, SUM_IN_PLACE = (
    f"mkldnn._convolution_pointwise{name}" for name in (".default", ".binary", "_.binary")
)  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Formula(nn.Module):
    """Three convolutions (0 and 1 alike) and what a test does with them."""

    def __init__(self, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)]
        )
        self.map = nn.Parameter(torch.randn(2, 4, 8, 8))
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, *self.convolutions, self.map)


def lively(model: nn.Module) -> nn.Module:
    """Evaluation mode, with statistics that are not those of initialisation."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval().requires_grad_(False)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def calls(network: Callable[[Tensor], Tensor], items: Tensor) -> Counter[str]:
    with Calls() as mode, torch.no_grad():
        network(items)
    return mode.names


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision.models.resnet18,
    "bottleneck": lambda: timm.create_model("resnet14t", num_classes=0),
    "groups": lambda: timm.create_model(
        "resnet26", num_classes=0, cardinality=8, base_width=4, layers=(1, 1, 1, 1)
    ),
    "dilation": lambda: timm.create_model("resnet18", num_classes=0, output_stride=8),
}


@pytest.mark.parametrize("name", list(TRUNKS))
def test_a_trunk_keeps_its_features_and_no_pass_is_left(name: str) -> None:
    model = lively(TRUNKS[name]())
    items = torch.randn(2, 3, 75, 97)
    folded = fold_batch_norms(model, items)
    fused = fuse_network(folded, items)
    assert fused is not None
    other = torch.randn(2, 3, 75, 97)
    kept = other.clone()
    with torch.no_grad():
        assert difference(fused(other), folded(other)) < 1e-5
    assert torch.equal(other, kept)
    found = calls(fused, items)
    blocks = sum(
        type(module).__name__ in ("BasicBlock", "Bottleneck") for module in model.modules()
    )
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert (found[SUM_IN_PLACE], found[CONVOLUTION]) == (blocks, convolutions - blocks)
    assert not [
        name
        for name in found
        if name.startswith(("aten.convolution", "aten.add.", "aten.add_", "aten.relu"))
    ]


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "efficientnet_b0", "mobilenetv3_small_050"]
)
def test_norms_with_an_activation_go_into_their_convolutions(name: str) -> None:
    """timm's own kind of norm; pads of its own before some convolutions; gates between others."""
    model = lively(timm.create_model(name, num_classes=0))
    items, other = torch.randn(2, 3, 2, 75, 97).unbind(2)
    folded = fold_batch_norms(model, items)
    fused = fuse_network(folded, items)
    assert fused is not None
    with torch.no_grad():
        assert difference(fused(other), model(other)) < 1e-4
    found = calls(fused, items)
    assert found[CONVOLUTION] + found[SUM_IN_PLACE] + found[SUM] > 40
    behind = ("aten.hardtanh", "aten.silu", "aten.hardswish", "aten.relu", "aten.convolution")
    assert not [each for each in found if each.startswith((*behind, "aten._native_batch_norm"))]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "one limit": lambda x: torch.ops.aten.hardtanh(x, -0.2),
    "two limits": lambda x: F.hardtanh(x, -0.3, 0.4),
    "in place": lambda x: F.silu(x, inplace=True),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation_is_computed_within_its_convolution(name: str) -> None:
    activate = ACTIVATIONS[name]
    torch.manual_seed(1)
    model = Formula(lambda x, a, b, c, m: activate(a(activate(b(x)))) + activate(c(x) + x))
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    items, other = torch.randn(2, 4, 8, 8), 3 * torch.randn(2, 4, 8, 8)
    fused = fuse_network(model, items)
    assert fused is not None and difference(fused(other), model(other)) < 1e-5
    found = calls(fused, items)
    assert found[CONVOLUTION] == 2 and found[SUM] + found[SUM_IN_PLACE] == 1
    left = [
        each for each in found if each.startswith(("aten.hardtanh", "aten.silu", "aten.hardswish"))
    ]
    assert len(left) == 1, "that of the sum, which only a rectifier can follow"


FORMULAS: dict[
    str, tuple[Callable[..., Tensor], int]
] = {  # what is computed, sums that may be written over the addend
    "in place": (lambda x, a, b, c, m: F.relu_(a(x)).add_(b(x)), 1),
    "rectified sum": (lambda x, a, b, c, m: F.relu(a(x) + b(x)), 1),
    "addend first": (lambda x, a, b, c, m: F.relu(F.relu(a(x)) + b(x)), 1),
    "addend is read later": (
        lambda x, a, b, c, m: torch.cat([y := F.relu(a(x)), F.relu(b(x) + y), c(y)]),
        0,
    ),
    "addend is returned": (
        lambda x, a, b, c, m: torch.stack([y := F.relu(a(x)), F.relu(b(y) + y)]),
        0,
    ),
    "addend has a view": (
        lambda x, a, b, c, m: (y := F.relu(a(x))).flatten(1) - F.relu(b(x) + y).flatten(1),
        0,
    ),
    "addend is a view": (
        lambda x, a, b, c, m: (y := F.relu(a(x)))[:, :, 2:6] + b(y[:, :, 2:6]) + y[:, :, :4],
        0,
    ),
    "addend is the input": (lambda x, a, b, c, m: F.relu(a(x) + x) + x, 0),
    "addend is a parameter": (lambda x, a, b, c, m: F.relu(a(F.relu(b(x))) + m), 0),
    "addend is rectified in place": (lambda x, a, b, c, m: F.relu(b(y := a(x)) + F.relu_(y)), 1),
    "convolution is used twice": (lambda x, a, b, c, m: F.relu(y := a(x)) * y + F.relu(b(x)), 0),
    "with itself": (lambda x, a, b, c, m: (y := F.relu(a(x)) + b(x)) + y, 1),
    "doubled": (lambda x, a, b, c, m: (y := a(F.relu(b(x)))) + y, 0),
    "weighted sum": (lambda x, a, b, c, m: torch.add(a(F.relu(b(x))), x, alpha=3.0), 0),
    "number": (lambda x, a, b, c, m: F.relu(a(F.relu(b(x))) + 1.0), 0),
    "broadcast": (lambda x, a, b, c, m: F.relu(a(x) + F.relu(b(x)).mean((2, 3), keepdim=True)), 0),
    "map is broadcast": (
        lambda x, a, b, c, m: F.relu(F.adaptive_avg_pool2d(a(x), 1) + F.relu(b(x))),
        0,
    ),
    "sum that is used twice": (lambda x, a, b, c, m: (y := a(x) + F.relu(b(x))) * F.relu(y), 1),
    "same convolution": (lambda x, a, b, c, m: F.relu(a(F.relu(a(x)))), 0),
    "rectified input": (lambda x, a, b, c, m: F.relu(a(x)) + F.relu(b(x.clone().relu_())), 0),
}


@pytest.mark.parametrize("name", list(FORMULAS))
def test_sums_are_written_over_an_addend_that_nobody_needs(name: str) -> None:
    formula, in_place = FORMULAS[name]
    torch.manual_seed(1)
    model = Formula(formula).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    items = torch.randn(2, 4, 8, 8)
    fused = fuse_network(model, items)
    assert fused is not None
    other, weights = torch.randn(2, 4, 8, 8), [value.clone() for value in model.parameters()]
    kept = other.clone()
    expected = model(other)
    assert difference(fused(other), expected) < 1e-5
    assert torch.equal(other, kept) and all(map(torch.equal, model.parameters(), weights))
    assert calls(fused, items)[SUM_IN_PLACE] == in_place


LAYERS = [
    {"stride": 2},
    {"stride": (1, 3), "padding": (2, 0)},
    {"padding": "same", "dilation": 2},
    {"groups": 8, "bias": False},
    {"groups": 2, "dilation": (2, 1), "padding": 1},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_kind_of_convolution(options: dict, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(8, 8, 3, **options), nn.ReLU(), nn.Conv2d(8, 5, 2), nn.ReLU())
        .eval()
        .requires_grad_(False)
    )
    items = torch.randn(1, 8, 13, 17).contiguous(memory_format=layout)
    fused = fuse_network(model.to(memory_format=torch.channels_last), items)
    assert fused is not None
    assert difference(fused(items), model(items)) < 1e-5
    assert calls(fused, items)[CONVOLUTION] == 2


def test_one_dimension_and_transposed_layers_are_left() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps, self.back, self.line = (
                nn.Conv2d(3, 4, 3),
                nn.ConvTranspose2d(4, 4, 3),
                nn.Conv1d(4, 4, 3),
            )
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.back(F.relu(self.maps(x))))
            return F.relu(self.line(F.relu(self.last(y)).mean(3)))

    torch.manual_seed(0)
    model, items = Mixed().eval().requires_grad_(False), torch.randn(2, 3, 9, 9)
    fused = fuse_network(model, items)
    assert fused is not None and difference(fused(items), model(items)) < 1e-5
    found = calls(fused, items)
    assert (found[CONVOLUTION], found["aten.convolution.default"]) == (2, 2)


def test_bf16_has_the_features_of_autocast_and_casts_no_weight_again() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bf16 in oneDNN here")
    model, items = lively(torchvision.models.resnet18()), torch.randn(2, 3, 64, 64)
    folded = fold_batch_norms(model, items)
    fused = fuse_network(folded, items, "bf16")
    assert fused is not None
    with torch.no_grad():
        exact, found = folded(items), fused(items)
        with torch.autocast("cpu", torch.bfloat16):
            expected = folded(items)
    assert found.dtype == torch.bfloat16
    assert difference(found, expected) < 2e-2
    assert difference(found, exact) < 1.5 * difference(expected, exact) + 1e-3
    assert (
        calls(fused, items)["aten._to_copy.default"] <= 3
    )  # pixels, and the classifier's weight and bias


def by_value(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, m: Tensor) -> Tensor:
    return F.relu(a(x)) if x.mean() > 0 else F.relu(b(x))


def by_constant(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, m: Tensor) -> Tensor:
    return F.relu(a(x)) * torch.from_numpy(x.detach().numpy().copy())


def nothing(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, m: Tensor) -> Tensor:
    return c(F.gelu(a(x))) * b(x)


@pytest.mark.parametrize("formula", [by_value, by_constant, nothing])
def test_what_cannot_be_fused_is_called_itself(formula: Callable[..., Tensor]) -> None:
    model = Formula(formula).eval().requires_grad_(False)
    network = FusedNetwork(model, "fp32")
    for seed in (0, 1):
        items = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert fuse_network(model, items) is None
            assert torch.equal(network(items), model(items))


def test_no_graph_in_training_on_other_devices_or_without_onednn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, items = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()),
        torch.randn(2, 3, 32, 32),
    )
    assert fuse_network(model.eval(), items) is not None
    assert fuse_network(model.train(), items) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert fuse_network(model.eval(), items) is None
    assert fuse_network(model.eval(), items, "fp16") is None
    assert fuse_network(model.eval(), items[:0]) is None
    assert fuse_network(model.to("meta"), items.to("meta")) is None


def test_a_graph_that_gives_other_features_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_network, "_free", lambda addend, total: True)
    torch.manual_seed(1)
    model = Formula(FORMULAS["addend is read later"][0]).eval().requires_grad_(False)
    assert fuse_network(model, torch.randn(2, 4, 8, 8)) is None


def test_other_shapes_layouts_and_gradients() -> None:
    model = fold_batch_norms(
        lively(timm.create_model("resnet14t", num_classes=0)), torch.randn(2, 3, 64, 64)
    )
    network = FusedNetwork(model, "fp32")
    with torch.no_grad():
        for shape in ((2, 3, 64, 64), (1, 3, 64, 64), (3, 3, 33, 47), (2, 3, 64, 64)):
            items = torch.randn(shape)
            for laid_out in (
                items,
                items.contiguous(memory_format=torch.channels_last),
                items.repeat(1, 1, 1, 2)[..., ::2],
            ):
                assert calls(network, laid_out)[CONVOLUTION] > 0
                assert difference(network(laid_out), model(laid_out)) < 1e-5
    pixels = torch.randn(2, 3, 64, 64, requires_grad=True)
    network(pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


def test_the_network_of_an_extraction_is_fused() -> None:
    model = lively(build_encoder("resnet18", weights="random").model)
    network = Network(model, torch.device("cpu"), "fp32", 4)
    tiles = torch.randint(0, 255, (6, 3, 64, 64), dtype=torch.uint8)
    features = torch.cat([network.launch(part).features() for part in tiles.split(4)])
    assert difference(features, model(tiles)) < 1e-4  # folding as well
    found = calls(lambda items: network.launch(items).features(), tiles[:4])
    assert found[SUM_IN_PLACE] == 8 and found[CONVOLUTION] > 0


class StubClock:
    """Time that passes only in its calls."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Callable[[], None]:
        """A call that takes these times, one after the other."""
        times = iter(seconds)

        def call() -> None:
            self.now += next(times)
            self.calls += 1

        return call


@pytest.mark.parametrize(
    ("fused", "plain", "chosen", "calls"),
    [
        ([0.1] * 3, [0.08] * 3, "plain", 6),
        ([0.1] * 3, [0.09] * 3, "fused", 6),  # within the margin
        ([0.5, 0.1, 0.5], [0.1] * 3, "fused", 6),  # disturbed: the shortest counts
        ([0.01], [0.001], "fused", 1),  # too short to matter
        ([1.5], [0.1], "fused", 1),  # too long to measure
        ([0.9], [0.5], "plain", 2),  # long calls take one turn
    ],
)
def test_the_faster_kernels_are_chosen_by_time(
    fused: list[float], plain: list[float], chosen: str, calls: int
) -> None:
    clock = StubClock()
    ways = {"fused": clock.work(*fused), "plain": clock.work(*plain)}
    assert choose_fastest(ways, clock) == chosen
    assert clock.calls == calls


def test_kernels_are_chosen_once_and_kept_for_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fold_batch_norms(
        lively(timm.create_model("resnet14t", num_classes=0)), torch.randn(2, 3, 64, 64)
    )
    for chosen, other in (("plain", "fused"), ("fused", "plain")):
        network, pixels = FusedNetwork(model, "fp32", "auto"), torch.randn(2, 3, 64, 64)
        monkeypatch.setattr(fused_network, "choose_fastest", lambda ways, chosen=chosen: chosen)
        with torch.no_grad():
            found = network(pixels)
            monkeypatch.setattr(fused_network, "choose_fastest", lambda ways, other=other: other)
            for items in (pixels, pixels[:1], pixels):
                assert (calls(network, items)[CONVOLUTION] > 0) == (chosen == "fused")
            assert network.kernels == chosen and difference(found, model(pixels)) < 1e-5
