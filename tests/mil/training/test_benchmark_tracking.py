"""A benchmark's trainings are runs of their own in the tracker, and its table is there too."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import mil.benchmark as benchmark
from tests.mil.training.test_training_pool import arguments
from tests.wsi_common.test_tracking import Recorder, read_events
from wsi_common.config import load_config


def start(cohort: Path, output: Path, *more: str) -> None:
    given = [*arguments(cohort, output), "isolated=false", *more]
    assert benchmark.main(load_config(benchmark.Config, given)) == 0


def test_tensorboard_shows_every_training_and_the_summary(make_cohort, tmp_path: Path) -> None:
    cohort, output = make_cohort(), tmp_path / "bench"
    start(cohort, output, "tracker.mode=tensorboard")
    runs = sorted(path.parent for path in output.rglob("metrics.jsonl"))
    assert len(runs) == 4
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        events = read_events(run)
        assert events["epochs/train_loss"] == [
            (line["epoch"], line["train_loss"]) for line in lines
        ]
        test = json.loads((run / "results.json").read_text())["test"]
        assert events["results/test/auc"] == [(0, test["auc"])]
    summary = read_events(output)
    table = json.loads((output / "summary.json").read_text())["feature_sets"]["bags"]
    for model in ("mean", "max"):
        assert summary[f"bags/{model}/auc_mean"] == [(0, table[model]["auc_mean"])]
        low, high = table[model]["auc_ci"]
        assert summary[f"bags/{model}/auc_ci/low"] == [(0, low)]
        assert summary[f"bags/{model}/auc_ci/high"] == [(0, high)]


def test_wandb_has_the_trainings_in_one_group(
    make_cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: name == "wandb" or found(name, *a)
    )
    start(make_cohort(), tmp_path / "bench", "tracker.mode=offline")
    names = [f"bags/{model}/seed1_fold{fold}" for model in ("mean", "max") for fold in (0, 1)]
    assert sorted(given["name"] for given in recorder.inits) == sorted([*names, "summary"])
    assert {given["group"] for given in recorder.inits} == {"bench"}
    assert recorder.ended == 5
