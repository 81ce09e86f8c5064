"""Networks made ready: folding and compiling keep the features, padding keeps them to the last
bit.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from patch_encoder.extraction.network import Network, fold_batch_norms, pad_batch
from patch_encoder.models.encoders import build_encoder
from wsi_common.errors import UserError

CPU = torch.device("cpu")


class Taken(nn.Module):
    """The convolution's output is used beside its BatchNorm: folding would change the result."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.convolution(pixels)
        return (features + self.norm(features)).mean((2, 3))


def trained_like(model: nn.Module) -> nn.Module:
    """Statistics and scales that are not those of initialisation."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -1, 1, generator=generator)
    return model.eval().requires_grad_(False)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_folding_takes_every_norm_out_and_keeps_the_features() -> None:
    model = trained_like(build_encoder("resnet18", weights="random").model)
    pixels = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    before = model(pixels)
    folded = fold_batch_norms(model, pixels)
    assert (norms(model), norms(folded)) == (20, 0)
    assert torch.allclose(folded(pixels), before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    assert torch.equal(model(pixels), before), "the encoder's own module is left as it was"


def test_a_norm_whose_convolution_is_used_elsewhere_stays() -> None:
    model = trained_like(Taken())
    pixels = torch.rand(2, 3, 8, 8)
    assert fold_batch_norms(model, pixels) is model
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    shared = trained_like(nn.Sequential(twice, twice, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert fold_batch_norms(shared, pixels) is shared
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten())
    assert fold_batch_norms(plain, pixels) is plain


@pytest.mark.parametrize("name", ["resnet18", "timm:test_vit"])
def test_a_tile_has_the_same_bits_in_any_batch(name: str) -> None:
    side = 160 if "vit" in name else 64
    encoder = build_encoder(name, weights="random")
    tiles = torch.randint(0, 255, (9, 3, side, side), dtype=torch.uint8)
    network = Network(encoder.model, CPU, "fp32", batch_size=6)
    together = torch.cat([network.launch(part).features() for part in tiles.split(6)])
    shifted = torch.cat(
        [network.launch(part).features() for part in (tiles[:2], tiles[2:3], tiles[3:9])]
    )
    assert torch.equal(together, shifted)
    assert together.shape == (9, encoder.dim)


def test_padding_adds_rows_of_zeros_only() -> None:
    items = torch.ones(2, 3, dtype=torch.uint8)
    assert pad_batch(items, 4).tolist() == [[1, 1, 1]] * 2 + [[0, 0, 0]] * 2
    assert pad_batch(items, 2) is items and pad_batch(items, 0) is items


class Small(nn.Linear):
    """A layer on a device that holds so many rows."""

    def __init__(self, rows: int, error: RuntimeError) -> None:
        super().__init__(2, 2)
        self.rows, self.error = rows, error

    def forward(self, input: Tensor) -> Tensor:
        if len(input) > self.rows:
            raise self.error
        return super().forward(input)


FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
    ),
)


@pytest.mark.parametrize("error", FULL, ids=["cuda", "cpu"])
def test_a_batch_that_does_not_fit_is_halved_with_one_warning(
    error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    model, items = Small(2, error), torch.rand(7, 2)
    network = Network(model, CPU, "fp32", 8)
    found = torch.cat([network.launch(part).features() for part in items.split(4)])
    assert network.rows == 2
    assert torch.allclose(found, nn.functional.linear(items, model.weight, model.bias), atol=1e-6)
    assert len([record for record in caplog.records if "batch_size=8" in record.message]) == 1


@pytest.mark.parametrize("error", FULL, ids=["cuda", "cpu"])
def test_a_tile_that_does_not_fit_alone_is_one_line(error: RuntimeError) -> None:
    with pytest.raises(UserError, match="batch_size=64: not even one tile"):
        Network(Small(0, error), CPU, "fp32", 64).launch(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        Network(Small(0, RuntimeError("shapes")), CPU, "fp32", 64).launch(torch.zeros(1, 2))


COMPILED = """
import torch
from torch import nn
from patch_encoder.extraction.network import Network
torch._dynamo.config.error_on_recompile = True
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
tiles = torch.rand(5, 3, 16, 16)
plain = Network(model, torch.device("cpu"), "fp32", 4)
fast = Network(model, torch.device("cpu"), "fp32", 4, compiler={backend!r})
for part in tiles.split(4):
    expected, found = plain.launch(part).features(), fast.launch(part).features()
    assert expected.shape == found.shape and torch.allclose(expected, found, atol=1e-5), (expected, found)
assert torch._dynamo.utils.counters["frames"]["total"] >= 1, "nothing was compiled"
"""


def run_compiled(python: Path, backend: str, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    code = COMPILED.format(backend=backend)
    return subprocess.run(
        [python, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.process
def test_compiled_features_are_the_same_and_one_shape_is_compiled_once(
    root: Path, warm_python: Path
) -> None:
    done = run_compiled(warm_python, "aot_eager", root)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.process
@pytest.mark.slow
def test_compiled_by_inductor_with_frozen_weights(root: Path, warm_python: Path) -> None:
    done = run_compiled(warm_python, "inductor", root)
    assert done.returncode == 0, done.stderr[-2000:]
