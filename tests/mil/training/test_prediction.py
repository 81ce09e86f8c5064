"""Large bags are predicted block by block: the whole bag's answer, wherever it lies, in bounded
memory, in mil.train too.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mil.datasets.bags import Sample, load_bags
from mil.models import MODELS, build
from mil.train import Config, main
from mil.training import engine, prediction
from mil.training.prediction import WHOLE_BYTES, predict
from mil.training.streaming import can_stream, stream
from tests.mil.models.small_options import SMALL
from wsi_common.config import load_config

CPU = torch.device("cpu")
DIM, SIZES = 7, (40, 9, 65, 8)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Bags of SIZES tiles in half precision."""
    generator = np.random.default_rng(0)
    for index, tiles in enumerate(SIZES):
        with h5py.File(tmp_path / f"s{index}.h5", "w") as file:
            file["features"] = generator.normal(size=(tiles, DIM)).astype(np.float16)
            file["coords"] = np.array([(i % 8, i // 8) for i in range(tiles)]) * 16
    return {f"s{index}": tmp_path / f"s{index}.h5" for index in range(len(SIZES))}


def samples(files: dict[str, Path], memory: int) -> list[Sample]:
    bags = load_bags(files, memory)
    return [Sample(slide, bags[slide], 0) for slide in files]


@pytest.mark.parametrize("name", list(MODELS))
def test_large_bags_have_the_answer_of_whole_ones(
    files: dict[str, Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    torch.manual_seed(0)
    model = build(name, DIM, 3, standardize=True, **SMALL[name]).eval()
    streamed = []
    monkeypatch.setattr(
        prediction,
        "stream",
        lambda *given, **more: streamed.append(len(given[1])) or stream(*given, 16, **more),
    )
    prediction.say_whole.cache_clear()
    expected = predict(model, samples(files, 10**6), CPU)
    assert not streamed
    limit = 9 * DIM * 4  # bags of more than 9 tiles are large
    found = [predict(model, samples(files, memory), CPU, "bf16", limit) for memory in (0, 10**6)]
    if not can_stream(model):
        assert not streamed and caplog.text.count("are read whole to be predicted") == 1
        found = [
            predict(model, samples(files, memory), CPU, "fp32", limit) for memory in (0, 10**6)
        ]
        assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
        return
    assert streamed == [40, 65, 40, 65] and not caplog.text
    torch.testing.assert_close(
        found[0][[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5
    )  # float32 in spite of bf16
    assert torch.equal(found[0], found[1])  # on disk or in memory
    torch.testing.assert_close(found[0][[1, 3]], expected[[1, 3]], rtol=0.1, atol=0.1)


def test_attention_of_a_large_bag_is_streamed(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    model = build("gated_abmil", DIM, 3, **SMALL["gated_abmil"]).eval()
    large = [engine.examine(model, bag, CPU) for bag in samples(files, 0)]
    asked = []
    monkeypatch.setattr(
        engine,
        "stream",
        lambda *given, **more: asked.append(len(given[1])) or stream(*given, 16, **more),
    )
    monkeypatch.setattr(prediction, "WHOLE_BYTES", 9 * DIM * 4)
    for bag, whole in zip(samples(files, 0), large, strict=True):
        output = engine.examine(model, bag, CPU)
        torch.testing.assert_close(output.logits, whole.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.attention, whole.attention, rtol=1e-5, atol=1e-6)
    assert asked == [40, 65]


def test_what_is_large_does_not_depend_on_the_file(files: dict[str, Path]):
    model = build("gated_abmil", DIM, 3, **SMALL["gated_abmil"]).eval()
    stored, loaded = samples(files, 0)[0].bag, samples(files, 10**6)[0].bag
    assert stored.features is None and loaded.features is not None
    for bag in (stored, loaded):  # half precision counts as float32
        assert not prediction.is_streamed(model, bag, 40 * DIM * 4)
        assert prediction.is_streamed(model, bag, 40 * DIM * 4 - 1)
    assert WHOLE_BYTES == 4 * 1024 * 32_768


def test_training_predicts_large_bags_by_streaming(
    make_cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cohort = make_cohort(slides=16)
    recipe = ["training.epochs=2", "training.min_epochs=1", "folds=2", "device=cpu", "ram_gb=1e-9"]

    def train(name: str) -> list[dict[str, str]]:
        paths = [
            f"labels={cohort}/labels.csv",
            f"features={cohort}/bags",
            f"output={tmp_path / name}",
        ]
        assert main(load_config(Config, [*paths, *recipe])) is None
        with (tmp_path / name / "predictions.csv").open() as stream:
            return list(csv.DictReader(stream))

    whole, streamed = train("whole"), []
    monkeypatch.setattr(prediction, "WHOLE_BYTES", 0)
    monkeypatch.setattr(
        prediction,
        "stream",
        lambda *given, **more: streamed.append(given[1].features is None) or stream(*given, **more),
    )
    parts = train("parts")
    validated = sum(row["split"] == "val" for row in whole)
    assert streamed == [True] * (2 * validated + len(whole))  # every epoch, then both sets
    assert [row["slide_id"] for row in whole] == [row["slide_id"] for row in parts]
    for first, second in zip(whole, parts, strict=True):
        assert float(first["prob_pos"]) == pytest.approx(float(second["prob_pos"]), abs=1e-5)


@pytest.mark.process
def test_memory_of_a_prediction_does_not_grow_with_the_bag(tmp_path: Path):
    """72,000 x 512 in half precision is 74 MB, 147 MB as float32 (larger than WHOLE_BYTES): less
    than 35 MB are taken for it.

    A bag of three blocks goes first, streamed as well: what the libraries set aside at their first
    call stays.
    """
    for name, tiles in (("small", 6_000), ("large", 72_000)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("features", (tiles, 512), "float16")
            for start in range(0, tiles, 6_000):
                file["features"][start : start + 6_000] = np.float16(start / 1e5)
    code = f"""
import torch
from wsi_common.memory import peak_memory
from mil.datasets.bags import Sample, load_bags
from mil.models import build
from mil.training.prediction import predict
torch.set_num_threads(1)
device = torch.device("cpu")
for name in ("gated_abmil", "dtfd"):
    model = build(name, 512, 2, hidden=32, attention=16)
    one, two = (
        [Sample(s, b, 0) for s, b in load_bags({{s: {str(tmp_path)!r} + "/" + s + ".h5"}}, 0).items()]
        for s in ("small", "large")
    )
    predict(model, one, device, whole=0)
    before = peak_memory()
    predict(model, two, device)
    print((peak_memory() - before) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    )
    grown = [float(line) for line in done.stdout.split()]
    assert len(grown) == 2 and max(grown) < 35, grown
