"""Bags that are read block by block: the whole-bag answer of every model that allows it, and
bounded memory.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mil.models import MODELS, build
from mil.models.output import MILOutput
from mil.training import streaming
from mil.training.streaming import STREAMED, WeightedSum, can_stream, stream
from patch_encoder.bags.bag import open_bag
from tests.mil.models.small_options import SMALL
from wsi_common.errors import UserError

CPU = torch.device("cpu")
TILES, DIM = 53, 7
REFUSED = (
    "transmil",
    "mhim_transmil",
    "rrt",
    "deform_mil",
    "hipt",
    *(name for name in MODELS if name.startswith("minet")),
)
CASES = [(name, {}) for name in MODELS if name not in REFUSED]
CASES += [("dtfd", {"distil": distil, "instances": 8}) for distil in ("maxs", "maxmins", "mas")]
CASES += [("dsmil", {"passing_v": True}), ("ilra", {"rank": 3, "layers": 3})]


@pytest.fixture
def bag_file(tmp_path: Path) -> Path:
    features = np.random.default_rng(3).normal(size=(TILES, DIM)).astype(np.float16)
    features[20] *= 30  # a tile far above the ones before it
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"] = features
    return tmp_path / "s.h5"


def trained(name: str, classes: int, **options: object) -> torch.nn.Module:
    torch.manual_seed(1)
    model = build(name, DIM, classes, standardize=True, **(SMALL[name] | options)).eval()
    model.mean.copy_(torch.linspace(-1, 1, DIM))
    model.std.copy_(torch.linspace(0.5, 2, DIM))
    return model


@pytest.mark.parametrize("block", [1, 8, 64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_blocks_give_the_whole_bags_answer(bag_file: Path, name: str, options: dict, block: int):
    for classes in (2, 3):
        model, bag = trained(name, classes, **options), open_bag(bag_file)
        with torch.inference_mode():
            whole: MILOutput = model(bag.read().float())
        found = stream(model, bag, CPU, block)
        torch.testing.assert_close(found.logits, whole.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.attention, whole.attention, rtol=1e-4, atol=1e-6)
        assert float(found.attention.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "passes"), [["dsmil", {"hidden": 6}, 2], ["dtfd", {"distil": "maxmins"}, 2]]
)
def test_embeddings_that_fit_into_memory_are_made_once(
    bag_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict, passes: int
):
    model, tiles, found = trained(name, 2, **options), [], []
    model.model.embed.register_forward_hook(lambda _, bag, __: tiles.append(len(bag[0])))
    for bound in (4 * TILES * (model.model.embed[0].out_features), 0):
        monkeypatch.setattr(streaming, "KEPT_BYTES", bound)
        found.append((stream(model, open_bag(bag_file), CPU, 8), sum(tiles)))
        tiles.clear()
    (kept, once), (again, more) = found
    assert torch.equal(kept.logits, again.logits) and torch.equal(kept.attention, again.attention)
    assert (
        more - once == (passes - 1) * TILES and TILES < once < 2 * TILES
    )  # and the rows asked for by number


@pytest.mark.parametrize(("bound", "passes"), [[4 * TILES * 64, 1], [0, 3]])
def test_tiles_of_ilra_that_fit_into_memory_go_through_each_layer_once(
    bag_file: Path, monkeypatch: pytest.MonkeyPatch, bound: int, passes: int
):
    model = build("ilra", DIM, 2, hidden=64, heads=4, rank=3, layers=3).eval()
    with torch.inference_mode():
        whole = model(open_bag(bag_file).read().float())
    tiles = []
    model.blocks[0].project_backward.register_forward_hook(
        lambda _, given, __: tiles.append(len(given[0]))
    )
    monkeypatch.setattr(streaming, "KEPT_BYTES", bound)
    found = stream(model, open_bag(bag_file), CPU, 8)
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.attention, whole.attention, rtol=1e-4, atol=1e-6)
    assert sum(tiles) == passes * TILES


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_streaming_form_are_refused(bag_file: Path, name: str):
    model = trained(name, 2)
    assert not can_stream(model)
    with pytest.raises(UserError, match="expected a model that is a reduction over tiles"):
        stream(model, open_bag(bag_file), CPU)


def test_every_other_model_streams():
    assert {name for name in MODELS if not can_stream(trained(name, 2))} == set(REFUSED)
    assert len(STREAMED) == 8  # NoTiles too, the covariates alone, which is none of MODELS


def test_pool_is_softmax_whatever_the_order_of_the_scores():
    scores, values = torch.randn(2, 40) * 30, torch.randn(40, 3)
    for order in (torch.arange(40), scores[0].argsort(), scores[0].argsort(descending=True)):
        pool = WeightedSum(40)
        for part in order.split(7):
            pool.add(scores[:, part], values[part])
        torch.testing.assert_close(pool.pooled(), scores.softmax(1) @ values)
        torch.testing.assert_close(pool.weights(), scores[:, order].softmax(1))


@pytest.mark.process
def test_memory_is_that_of_a_block(tmp_path: Path):
    """100,000 x 512 in half precision is 102 MB (205 MB as float32): the process grows by less than
    half of it.

    A bag of three blocks goes first: what the libraries set aside at their first call does not
    depend on the bag.
    """
    for name, tiles in (("small", 10_000), ("large", 100_000)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("features", (tiles, 512), "float16", fillvalue=0.5).attrs[
                "made"
            ] = "here"
            for start in range(0, tiles, 10_000):
                file["features"][start : start + 10_000] = np.float16(start / 1e5)
    code = f"""
import torch
from wsi_common.memory import peak_memory
from mil.models import build
from mil.training.streaming import stream
from patch_encoder.bags.bag import open_bag
torch.set_num_threads(1)
model = build("gated_abmil", 512, 2, hidden=32, attention=16).eval()
stream(model, open_bag({str(tmp_path / "small.h5")!r}), torch.device("cpu"), 4096)
before = peak_memory()
output = stream(model, open_bag({str(tmp_path / "large.h5")!r}), torch.device("cpu"), 4096)
print((peak_memory() - before) / 2**20, len(output.attention))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    grown, tiles = done.stdout.split()
    assert float(grown) < 50 and int(tiles) == 100_000
