"""Regression: loss, standardisation, strata and metrics of a continuous target."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch.nn.functional import huber_loss, mse_loss

from mil.datasets.splits import Split, check_split, make_splits
from mil.tasks.records import TaskOptions
from mil.tasks.regression import Regression, quantile_bins, weighted_ranks
from mil.tasks.table import fit_task, read_targets
from mil.train import Config, main
from tests.mil.tasks.task_cohorts import rewrite
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError


@pytest.mark.parametrize(("criterion", "torchs"), [("mse", mse_loss), ("huber", huber_loss)])
def test_loss_is_torchs_on_standardised_targets(criterion: str, torchs):
    task = Regression(centre=40.0, scale=8.0, criterion=criterion)
    for logit, target, standardised in ((0.5, 50.0, 1.25), (-2.0, 56.0, 2.0), (0.0, 40.0, 0.0)):
        found = task.loss(torch.tensor([logit]), torch.tensor([target], dtype=torch.float64))
        torch.testing.assert_close(found, torchs(torch.tensor(logit), torch.tensor(standardised)))
        assert float(task.predict(torch.tensor([[logit]]))) == pytest.approx(40.0 + 8.0 * logit)


def write_labels(path: Path, labels: list[str], splits: list[str] | None = None) -> Path:
    rows = [
        f"c{i},s{i:02d},{label},{splits[i] if splits else ''}" for i, label in enumerate(labels)
    ]
    path.write_text("\n".join(["case_id,slide_id,label,split", *rows]) + "\n")
    return path


def test_the_task_takes_mean_and_std_from_the_training_slides_alone(tmp_path: Path):
    path = write_labels(tmp_path / "labels.csv", ["1", "3", "1000", "5"])
    _, targets = read_targets(path, "regression")
    task = fit_task(targets, ["s00", "s01"], TaskOptions(regression_loss="huber"))
    assert task == Regression(centre=2.0, scale=1.0, criterion="huber")
    assert task.evidence(targets.of("s02")).tolist() == [1.0]
    assert task.evidence(targets.of("s00")).tolist() == [0.0]
    with pytest.raises(UserError, match="expected different targets in the training set, found 3"):
        fit_task(targets, ["s01"], TaskOptions())


def test_labels_that_are_no_numbers_or_all_equal_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="slide s01: expected a finite number in label, found 'x'"):
        read_targets(write_labels(tmp_path / "text.csv", ["1", "x"]), "regression")
    with pytest.raises(UserError, match="expected different numbers in label, found 2 for every"):
        read_targets(write_labels(tmp_path / "same.csv", ["2", "2.0"]), "regression")


def test_folds_are_stratified_by_quantile_bins(tmp_path: Path):
    values = np.random.default_rng(0).exponential(size=60)
    bins = quantile_bins(values.tolist())
    assert Counter(bins) == {f"bin{i}": 15 for i in (1, 2, 3, 4)}
    assert [name for _, name in sorted(zip(values, bins, strict=True))] == sorted(bins)
    assert len(set(quantile_bins([0.0] * 30 + [1.0] * 10))) == 2
    assert set(quantile_bins([3.0, 1.0])) == {"bin1"}
    slides, _ = read_targets(
        write_labels(tmp_path / "labels.csv", [repr(float(v)) for v in values]), "regression"
    )
    for split in make_splits(slides, "cv", 5, 0.2, 1):
        assert set(Counter(slides.only(split.test).targets.tolist()).values()) == {3}
    # an official set may lack a bin, which no metric needs
    ids = slides.slide_ids
    check_split(slides, Split(0, tuple(ids[:50]), (ids[50],), (ids[51],)))


def test_weighted_ranks_are_those_of_the_copied_rows():
    generator = np.random.default_rng(0)
    values, weights = generator.integers(0, 6, 20), generator.integers(0, 4, (5, 20))
    ranks = weighted_ranks(values, weights)
    for row, drawn in zip(ranks, weights, strict=True):
        copies = np.repeat(np.arange(20), drawn)
        np.testing.assert_allclose(row[copies], rankdata(values[copies]))


def predictions(folder: Path) -> np.ndarray:
    with (folder / "predictions.csv").open(newline="") as stream:
        return np.array([float(row["predicted"]) for row in csv.DictReader(stream)])


def test_the_unit_of_the_target_does_not_matter(make_cohort, tmp_path: Path):
    """Targets of another unit give the same predictions in that unit."""
    found = {}
    for name, factor, shift in (("plain", 1.0, 0.0), ("unit", 1e6, -3e9)):
        cohort = rewrite(make_cohort(name=name, slides=32), "regression")
        lines = (cohort / "labels.csv").read_text().splitlines()
        rows = [line.split(",") for line in lines[1:]]
        text = [f"{a},{b},{factor * float(y) + shift!r},{d}" for a, b, y, d in rows]
        (cohort / "labels.csv").write_text("\n".join([lines[0], *text]) + "\n")
        given = [f"labels={cohort}/labels.csv", f"features={cohort}/bags", "task=regression"]
        given += [f"output={tmp_path}/run_{name}", "device=cpu", "folds=2", "model=mean"]
        given += ["training.epochs=3", "training.min_epochs=1", "training.lr=1e-2"]
        assert main(load_config(Config, given)) is None
        found[name] = predictions(tmp_path / f"run_{name}")
    scaled = 1e6 * found["plain"] - 3e9
    np.testing.assert_allclose(found["unit"], scaled, atol=1e-3 * np.ptp(scaled))


def test_the_loss_is_an_option_of_regression(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cohort = rewrite(make_cohort(slides=24), "regression")
    given = [f"labels={cohort}/labels.csv", f"features={cohort}/bags", "device=cpu", "folds=2"]
    given += ["model=mean", "training.epochs=2", "training.min_epochs=1", "task=regression"]
    for loss in ("mse", "huber"):
        output = f"output={tmp_path}/{loss}"
        assert run_script(main, Config, [*given, output, f"regression_loss={loss}"]) == 0
    assert not np.allclose(predictions(tmp_path / "mse"), predictions(tmp_path / "huber"))
    assert run_script(main, Config, [*given, f"output={tmp_path}/no", "regression_loss=mae"]) == 2
    assert "regression_loss" in capsys.readouterr().err and not (tmp_path / "no").exists()
