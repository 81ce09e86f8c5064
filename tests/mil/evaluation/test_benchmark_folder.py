"""Which feature set of a benchmark is the best, and where its bags are after it was moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from mil.evaluation.benchmark_folder import choose_feature_set, find_features
from mil.tasks.classification import Classification
from mil.tasks.regression import Regression
from wsi_common.errors import UserError


def test_the_best_feature_set_is_that_of_the_headline_metric():
    task = Classification(("neg", "pos"))
    sets = {
        "control": {"abmil": {"auc_mean": 0.5}, "mean": {"auc_mean": 0.9}},
        "student": {"abmil": {"auc_mean": 0.8}, "mean": {"auc_mean": 0.7}},
        "broken": {"abmil": {"auc_mean": None}},
    }
    assert choose_feature_set({"feature_sets": sets}, "abmil", task) == "student"
    assert choose_feature_set({"feature_sets": sets}, "mean", task) == "control"
    assert choose_feature_set({"feature_sets": sets}, "max", task) == "control"  # none has it
    errors, task = {"a": {"m": {"mae_mean": 2.0}}, "b": {"m": {"mae_mean": 1.0}}}, Regression()
    for entry in errors.values():
        entry["m"] |= {f"{task.headline}_mean": entry["m"]["mae_mean"]}
    lower = task.headline in task.lower_is_better
    assert choose_feature_set({"feature_sets": errors}, "m", task) == ("b" if lower else "a")


def test_bags_of_a_moved_benchmark_are_found_beside_it_or_asked_for(tmp_path: Path):
    summary = {
        "features": {"uni": str(tmp_path / "old" / "bags")},
        "features_beside": {"uni": "../bags"},
    }
    new = tmp_path / "new" / "bench"
    for folder in (new, tmp_path / "new" / "bags", tmp_path / "given"):
        folder.mkdir(parents=True)
    assert Path(find_features(new, summary, "uni")).samefile(tmp_path / "new" / "bags")
    given = str(tmp_path / "given")
    assert find_features(new, summary, "uni", given) == given
    (tmp_path / "old" / "bags").mkdir(parents=True)
    assert find_features(new, summary, "uni") == summary["features"]["uni"]
    (tmp_path / "old" / "bags").rmdir()
    (tmp_path / "new" / "bags").rmdir()
    with pytest.raises(UserError, match="bags of uni in .*old/bags or .* give features=<folder"):
        find_features(new, summary, "uni")
