"""TensorBoard and Weights & Biases say what metrics.jsonl says, whatever was interrupted."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsi_common.config import key
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.run import Run, open_run
from wsi_common.tracking import Tracker, flatten_numbers

WORLD = World(0, 1, torch.device("cpu"))


@dataclass
class Config:
    lr: float = key(0.1, "learning rate")


EVENTS = Tracker("tensorboard")


def start(path: Path, tracker: Tracker, **named: Any) -> Run:
    return open_run(path, Config(), WORLD, inputs={}, tracker=tracker, **named)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of the event files of a run, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    assert any("config" in tag for tag in tags["tensors"])
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]
        for tag in tags["scalars"]
    }


def test_event_files_have_the_lines_and_the_results(tmp_path: Path) -> None:
    run = start(tmp_path, EVENTS)
    run.log({"epoch": 1, "step": 10, "loss": 2.0})
    run.log({"epoch": 1, "loss": 1.5, "auc": float("nan"), "name": "x"})
    run.log({"epoch": 2, "loss": 1.0, "auc": 0.75})
    run.finish({"test": {"auc": 0.5, "ci": [0.1, 0.9]}, "model": "abmil"})
    assert read_events(tmp_path) == {
        "steps/loss": [(10, 2.0)],
        "epochs/loss": [(1, 1.5), (2, 1.0)],
        "epochs/auc": [(2, 0.75)],
        "results/test/auc": [(0, 0.5)],
    }


def test_a_resumed_run_shows_no_epoch_twice(tmp_path: Path) -> None:
    """Also what was logged before the tracker was switched on."""
    run = start(tmp_path, Tracker())
    run.log({"epoch": 1, "loss": 3.0})
    run = start(tmp_path, EVENTS)
    run.log({"epoch": 2, "loss": 2.0})
    run.log({"epoch": 3, "loss": 9.0})
    run = start(tmp_path, EVENTS)
    run.forget_after(2)
    run.log({"epoch": 3, "loss": 1.0})
    run.finish({})
    assert read_events(tmp_path) == {"epochs/loss": [(1, 3.0), (2, 2.0), (3, 1.0)]}


def test_a_finished_run_that_is_started_again_keeps_its_event_files(tmp_path: Path) -> None:
    run = start(tmp_path, EVENTS)
    run.log({"epoch": 1, "loss": 3.0})
    run.finish({})
    before = {path: path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()}
    assert start(tmp_path, EVENTS).results == {}
    assert before == {path: path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()}


def test_other_processes_track_nothing(tmp_path: Path) -> None:
    start(tmp_path, Tracker())
    other = open_run(
        tmp_path, Config(), World(1, 1, torch.device("cpu")), inputs={}, tracker=EVENTS
    )
    other.log({"epoch": 1, "loss": 1.0})
    other.finish({})
    assert not (tmp_path / "tensorboard").exists()


class Recorder:
    """In the place of the wandb package: notes what it is given."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.ended = 0

    def init(self, **given: Any) -> Any:
        self.inits.append(given)
        return SimpleNamespace(log=self.lines.append, summary=self.summary, finish=self.end)

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return recorder


def test_a_resumed_wandb_run_is_the_same_run_with_its_group(
    tmp_path: Path, wandb: Recorder
) -> None:
    tracker = Tracker("offline", "lab")
    for epoch in (1, 2):
        run = start(tmp_path, tracker, label="study/uni/abmil/seed1_fold0")
        assert not wandb.lines or epoch == 2, "nothing is started before the first line"
        run.log({"epoch": epoch, "loss": 1.0})
    run.finish({"test": {"auc": 0.5}})
    first, second = wandb.inits
    assert first == second and len(first["id"]) == 16
    assert (first["project"], first["mode"], first["resume"]) == ("lab", "offline", "allow")
    assert (first["group"], first["name"]) == ("study", "uni/abmil/seed1_fold0")
    assert first["config"] == {"lr": 0.1} and first["dir"] == str(tmp_path)
    assert [line["epoch"] for line in wandb.lines] == [1, 2]
    assert wandb.summary == {"test/auc": 0.5} and wandb.ended == 1


def test_a_finished_run_starts_no_wandb_run_and_one_alone_has_its_folder_s_name(
    tmp_path: Path, wandb: Recorder
) -> None:
    start(tmp_path / "alone", Tracker("online")).finish({})
    assert wandb.inits[0]["name"] == "alone" and "group" not in wandb.inits[0]
    start(tmp_path / "alone", Tracker("online"))
    assert len(wandb.inits) == 1


@pytest.mark.parametrize(("mode", "package"), [("online", "wandb"), ("tensorboard",) * 2])
def test_a_missing_package_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, package: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"tracker.mode={mode}: expected the package {package}"):
        start(tmp_path, Tracker(mode))


def test_numbers_are_named_by_their_places() -> None:
    values = {"a": {"b": 1, "c": float("inf")}, "d": [1.0], "e": None, "f": 0.5}
    values["auc_ci"] = [0.25, None]
    assert flatten_numbers(values) == {"a/b": 1.0, "f": 0.5, "auc_ci/low": 0.25}
