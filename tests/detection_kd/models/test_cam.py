"""The weak localiser: every trunk, pooling and mode, and checkpoints that rebuild it alone."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detection_kd.models.cam import (
    MODES,
    NORMS,
    POOLINGS,
    LocaliserKeys,
    WeakLocaliser,
    enlarge_maps,
    load_localiser,
    pool_cells,
)
from detection_kd.models.normalised_network import place_network
from patch_encoder.models.encoder_table import EFFICIENTNET_LITE
from tests.helpers import ROOT
from wsi_common.checkpoint import save_checkpoint
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError

SMALL = {"trunk": "small", "init": "random"}


def build(**keys: object) -> WeakLocaliser:
    """A network in evaluation mode with the small trunk, unless another is given."""
    return WeakLocaliser(LocaliserKeys(**{**SMALL, **keys})).eval()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_pooling_in_every_mode(pooling: str, mode: str, norm: str) -> None:
    model = build(pooling=pooling, mode=mode, norm=norm)
    maps, bags = model(torch.rand(3, 3, 48, 40))
    assert maps.shape == (3, 1, 12, 10) and bags.shape == (3,)
    bags.sum().backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", NORMS)
def test_a_cell_knows_nothing_of_far_pixels(norm: str) -> None:
    """Else the network could be right about the tile and wrong about the place."""
    model, pixels = build(norm=norm), torch.rand(1, 3, 96, 96)
    changed = pixels.clone()
    changed[..., :16, :16] = 0
    different = (model(pixels).maps != model(changed).maps)[0, 0]
    assert different[:4, :4].all() and not different[12:].any() and not different[:, 12:].any()


def test_a_batch_of_one_keeps_its_dimension() -> None:
    assert build()(torch.rand(1, 3, 32, 32)).bags.shape == (1,)


def test_the_small_trunk_is_small() -> None:
    assert sum(p.numel() for p in build().parameters()) < 100_000


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("trunk", ["resnet18", "resnet50", "tf_efficientnet_lite0"])
def test_timm_trunks_are_cut_after_a_stage(trunk: str, stage: int) -> None:
    """Stage n has a stride of 2^(n + 1) px; 500 px give the published maps of 125, 63, 32, 16."""
    with torch.device("meta"):
        model = build(trunk=trunk, stage=stage)
        maps = model(torch.empty(2, 3, 500, 500)).maps
    side = math.ceil(500 / 2 ** (stage + 1))
    assert maps.shape == (2, 1, side, side)


def test_nothing_behind_the_last_stage_is_kept() -> None:
    """The original's checkpoint holds 8.9 million parameters that no forward pass uses."""
    model = build(trunk="resnet18", stage=3)
    model(torch.rand(2, 3, 64, 64)).bags.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 2.9e6


def test_pooling_against_hand_computed_values() -> None:
    maps = torch.tensor([0.0, 1.0, 2.0, 5.0]).view(1, 1, 2, 2)

    def pool(name: str) -> float:
        return pool_cells(maps, name, 0.5, 2.0).item()

    assert (pool("max"), pool("mean"), pool("topk")) == (5.0, 2.0, 3.5)
    expected = math.log(sum(math.exp(2 * x) for x in (0, 1, 2, 5)) / 4) / 2
    assert pool("lse") == pytest.approx(expected)


def test_embedding_mode_pools_features_by_the_named_pooling() -> None:
    """The original takes the maximum whatever the name."""
    pixels = torch.rand(2, 3, 32, 32)
    for pooling in ("max", "mean"):
        model = build(mode="embedding", pooling=pooling)
        features = model.features(pixels).flatten(2)
        pooled = features.amax(-1) if pooling == "max" else features.mean(-1)
        expected = pooled @ model.head.weight.flatten() + model.head.bias
        torch.testing.assert_close(model(pixels).bags, expected)


def test_the_enlarged_map_has_a_lower_maximum() -> None:
    """White noise on 32 x 32 cells: 3.28 on the grid, 3.19 where 500 px sample it, on average."""
    torch.manual_seed(0)
    noise = torch.randn(64, 1, 32, 32)
    grid, enlarged = noise.amax((1, 2, 3)), enlarge_maps(noise, (500, 500)).amax((1, 2, 3))
    assert (enlarged <= grid + 1e-6).all()
    assert grid.mean().item() == pytest.approx(3.25, abs=0.1)
    assert (grid - enlarged).mean().item() == pytest.approx(0.09, abs=0.03)
    model = build(enlarged=True)
    maps, bags = model(torch.rand(2, 3, 50, 50))
    torch.testing.assert_close(bags, enlarge_maps(maps, (50, 50)).amax((1, 2, 3)))


def test_pixels_are_normalised_as_the_weights_want_them() -> None:
    model = build(trunk="tf_efficientnet_lite0", stage=2, init="imagenet_lite0")
    assert model.statistics == EFFICIENTNET_LITE
    random = build(trunk="tf_efficientnet_lite0", stage=2)
    first = "trunk.network.conv_stem.weight"
    assert not torch.equal(model.state_dict()[first], random.state_dict()[first])


@pytest.mark.parametrize(
    "keys",
    [
        {"pooling": "lse", "sharpness": 3.0},
        {"trunk": "tf_efficientnet_lite0", "stage": 2, "init": "imagenet_lite0"},
        {"trunk": "resnet18", "stage": 1, "mode": "embedding"},
    ],
)
def test_a_checkpoint_rebuilds_the_network_alone(keys: dict[str, object], tmp_path: Path) -> None:
    model, file = build(**keys), tmp_path / "best.pt"
    threshold = 1 / 3  # has no short decimal form
    described = model.describe() | {"threshold": threshold, "side": 64}
    save_checkpoint(file, model=model.state_dict(), config=described, epoch=1)
    again, description = load_localiser(file)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(pixels).maps, model(pixels).maps)
    assert again.describe() == model.describe() and again.statistics == model.statistics
    assert description["threshold"] == threshold, "to the last bit"


def test_the_trunk_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    model = build()
    place_network(model, World(0, 1, torch.device("cpu")), "small", compile=True)
    assert compiled == [model.trunk]


@pytest.mark.process
def test_the_network_is_one_graph() -> None:
    """In a process without checks of types, which no compiler sees through."""
    code = """
import torch
from detection_kd.models.cam import LocaliserKeys, WeakLocaliser
for keys in ({"trunk": "small"}, {"trunk": "resnet18", "stage": 1, "pooling": "lse"}):
    model = WeakLocaliser(LocaliserKeys(init="random", **keys)).eval()
    pixels = torch.rand(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(pixels)
    torch.testing.assert_close(compiled.bags, model(pixels).bags)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init": "imagenet_lite0"}, "network.trunk=small: expected network.init=random"),
        ({"mode": "embedding", "enlarged": True}, "expected network.enlarged=false"),
        ({"top_share": 0.0}, "network.top_share=0.0"),
        ({"trunk": "resnet18", "stage": 5}, "network.stage=5: expected a trunk with so many"),
        ({"trunk": "resnet19"}, "no such network"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**keys)


def test_batch_norm_in_two_processes_needs_cuda() -> None:
    two = World(0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match=r"2 processes.*use network.trunk=small network.norm=layer"):
        place_network(build(), two, "small", compile=False)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "detector.pt"
    save_checkpoint(file, model={}, config={"kind": "deformable_detr"}, epoch=1)
    with pytest.raises(UserError, match="expected a mitosis localiser .*found kind 'deformable"):
        load_localiser(file)
    with pytest.raises(UserError, match="found no file"):
        load_localiser(tmp_path / "missing.pt")


def test_unknown_names_are_refused_when_keys_are_read() -> None:
    with pytest.raises(UserError, match="expected one of max, mean, topk, lse"):
        load_config(LocaliserKeys, ["pooling=median"])
