"""What every training script is held to, as functions that are the same for all of them: it learns,
a killed run resumes bit for bit, and two processes train as one.

`tests/training_rows.py` has one row per script and way of training; `tests/test_training_scripts.py`
applies these functions to each row.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT, kill_when, line_count, run_two_processes
from wsi_common.checkpoint import load_checkpoint, load_tensors
from wsi_common.cli import run

# columns of metrics.jsonl that depend on the machine
MACHINE = ("time/", "train_seconds")


@dataclass(frozen=True)
class Pair:
    """How two processes are compared with one.

    Attributes:
        settings: of both runs; `{output}` in them stands for the run's own folder.
        alone: settings that only the two processes get, e.g. fewer tiles per process and step.
        close: columns of metrics.jsonl by name or, where it ends in `*`, by its beginning, and the
            relative tolerance of every line.
        first: the same for the first line, where rounding has not been amplified yet.
        weights: relative and absolute tolerance of the last checkpoint's tensors.
        torchrun: start the two through torchrun itself.
        check: further assertions about the folders of one and of two processes.
    """

    settings: tuple[str, ...]
    close: dict[str, float]
    alone: tuple[str, ...] = ()
    first: dict[str, float] = field(default_factory=dict)
    absolute: float = 0.0
    weights: tuple[float, float] | None = None
    torchrun: bool = False
    check: Callable[[Path, Path], None] | None = None


@dataclass(frozen=True)
class Row:
    """One script in one way of training.

    Attributes:
        name: in the tests' names.
        script: module that is started with `python -m`.
        loop: module whose `train_one_epoch` the script calls once per epoch.
        inputs: writes what the script reads into a folder and returns the arguments that name it.
        settings: of the run that is finished, killed and resumed.
        kill_at: complete lines of metrics.jsonl at which it is killed.
        learns: column of metrics.jsonl and the share of its first value that the last one stays
            below; None where another row of the same script shows it.
        resumes: whether it is killed and resumed.
        pair: how it is compared with two processes; None where another row shows it.
        checkpoints: files that a finished run leaves, at least.
    """

    name: str
    script: str
    loop: str
    inputs: Callable[[Path], list[str]]
    settings: tuple[str, ...] = ()
    kill_at: int = 2
    learns: tuple[str, float] | None = None
    resumes: bool = True
    pair: Pair | None = None
    checkpoints: tuple[str, ...] = ("checkpoint_last.pt", "checkpoint_best.pt")


def start(row: Row, arguments: list[str]) -> int:
    """Run the script in this process and return its exit status."""
    module = importlib.import_module(row.script)
    return run(module.main, module.Config, arguments)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(MACHINE)}
        for line in lines
    ]


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The lines that sum up an epoch, not those of single steps."""
    return [line for line in read_metrics(folder) if "step" not in line]


def assert_learned(folder: Path, column: str, share: float) -> None:
    """The last epoch's value of a loss is below `share` of the first one's."""
    values = [line[column] for line in read_epochs(folder)]
    assert values[-1] < share * values[0], values


def assert_equal(first: Any, second: Any, place: str) -> None:
    """Equality of nested dicts and lists, of tensors to the last bit."""
    assert type(first) is type(second), place
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for name, value in first.items():
            assert_equal(value, second[name], f"{place}.{name}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{place}[{index}]")
    else:
        assert first == second or first != first, place


def assert_same_run(first: Path, second: Path, needed: tuple[str, ...]) -> None:
    """Two run directories hold the same training: every checkpoint with optimiser, schedule and
    random states, every logged value, the results and the predictions.
    """
    checkpoints = sorted(path.name for path in first.glob("*.pt"))
    assert set(needed) <= set(checkpoints)
    assert checkpoints == sorted(path.name for path in second.glob("*.pt"))
    for name in checkpoints:
        contents = [torch.load(folder / name, weights_only=True) for folder in (first, second)]
        for content in contents:
            content.pop("config", None)  # names the output folder
            # the checks of types, which run in this process alone, draw from Python's generator
            content.get("rng", {}).pop("python", None)
        assert_equal(*contents, name)
    assert read_metrics(first) == read_metrics(second)
    for name in ("results.json", "predictions.csv"):
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            assert (first / name).read_text() == (second / name).read_text(), name


def assert_resumes(row: Row, arguments: list[str], finished: Path, output: Path) -> None:
    """SIGKILL the script, start it again, and compare with the uninterrupted run; what was finished
    before the kill is not trained again.
    """
    last = output / "checkpoint_last.pt"
    kill_when(
        lambda: line_count(output / "metrics.jsonl") >= row.kill_at and last.exists(),
        row.script,
        [*arguments, f"output={output}"],
    )
    assert not (output / "results.json").exists()
    before = torch.load(last, weights_only=True)["epoch"]
    total = len(read_epochs(finished))
    assert 1 <= before < total
    with count_epochs(row) as trained:
        assert start(row, [*arguments, f"output={output}"]) == 0
        assert len(trained) == total - before
    assert_same_run(finished, output, row.checkpoints)


def assert_left_alone(row: Row, arguments: list[str], finished: Path) -> None:
    """The same command over a finished run trains nothing and writes no checkpoint."""
    stamps = {path: path.stat().st_mtime_ns for path in finished.glob("*.pt")}
    with count_epochs(row) as trained:
        assert start(row, [*arguments, f"output={finished}"]) == 0
        assert not trained
    assert stamps == {path: path.stat().st_mtime_ns for path in finished.glob("*.pt")}


def assert_shared(finished: Path) -> None:
    """The run's best weights, or those of its backbone, are there as safetensors, with the
    description that its checkpoint has.
    """
    shared = load_checkpoint(finished / "model.safetensors")
    best = finished / "checkpoint_best.pt"
    if best.is_file():
        wanted = load_checkpoint(best)
        assert_equal(shared["model"], dict(wanted["model"]), "model")
        assert shared["config"] == json.loads(json.dumps(wanted["config"]))
        assert (shared["epoch"], shared.get("best")) == (wanted["epoch"], wanted.get("best"))
    else:
        weights = load_tensors(finished / "backbone.pt", "weights")
        assert_equal(shared["model"], dict(weights), "backbone")
        described = next(finished.glob("*encoder.json"))
        assert shared["config"]["backbone"] == json.loads(described.read_text())


class count_epochs:
    """A list that grows by one with every epoch that a row's script trains in this process."""

    def __init__(self, row: Row) -> None:
        self.patch, self.loop = pytest.MonkeyPatch(), importlib.import_module(row.loop)

    def __enter__(self) -> list[None]:
        trained: list[None] = []
        original = self.loop.train_one_epoch

        def count(*given: Any, **named: Any) -> Any:
            trained.append(None)
            return original(*given, **named)

        self.patch.setattr(self.loop, "train_one_epoch", count)
        return trained

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def torchrun(script: str, arguments: list[str]) -> None:
    """Two processes as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--nproc-per-node=2", "-m", script, *arguments],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def assert_pair_is_one(row: Row, inputs: list[str], folder: Path) -> None:
    """Two processes at the same global batch log the losses of one, and have its weights."""
    pair = row.pair
    assert pair is not None
    one, two = folder / "one", folder / "two"

    def arguments(output: Path, *more: str) -> list[str]:
        given = [*inputs, *pair.settings, *more, "output={output}"]
        return [value.replace("{output}", str(output)) for value in given]

    assert start(row, arguments(one)) == 0
    starter = torchrun if pair.torchrun else run_two_processes
    starter(row.script, arguments(two, *pair.alone))
    lines = list(zip(read_metrics(one), read_metrics(two), strict=True))
    assert lines
    for number, (first, second) in enumerate(lines):
        assert_close(first, second, pair.close, pair.absolute)
        if number == 0:
            assert_close(first, second, pair.first, 0.0)
    if pair.weights:
        relative, absolute = pair.weights
        models = [
            torch.load(path / "checkpoint_last.pt", weights_only=True)["model"]
            for path in (one, two)
        ]
        torch.testing.assert_close(*models, rtol=relative, atol=absolute)
    if pair.check:
        pair.check(one, two)


def assert_close(
    first: dict[str, Any], second: dict[str, Any], columns: dict[str, float], absolute: float
) -> None:
    """The named columns of two lines, each of which must be there."""
    for pattern, relative in columns.items():
        names = [
            name
            for name in first
            if name == pattern or (pattern[-1] == "*" and name.startswith(pattern[:-1]))
        ]
        assert names, f"no column {pattern} among {sorted(first)}"
        for name in names:
            assert second[name] == pytest.approx(first[name], rel=relative, abs=absolute), name
