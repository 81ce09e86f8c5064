"""Probes in the benchmark: their fits are what independent programs find, for every kind of task,
and they stand beside the trained classifiers with the same splits and tables.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from mil import benchmark, train
from mil.models import PROBES, build
from mil.models.probes import LINKS, invert_link
from mil.tasks.classification import Classification
from mil.tasks.cox import Cox
from mil.tasks.discrete import Discrete
from mil.tasks.multilabel import Multilabel
from mil.tasks.ordinal import Ordinal
from mil.tasks.regression import Regression
from mil.training.engine import load_trained_model
from mil.training.probe_fit import solve
from patch_encoder.bags.bag import read_bag
from patch_encoder.probing.knn import knn_probe
from tests.mil.tasks.task_cohorts import COHORTS, rewrite
from wsi_common.cli import run


def draw(slides: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, np.random.Generator]:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(slides, dim)))
    return (x - x.mean(0)) / x.std(0, correction=0), rng


@pytest.mark.parametrize("dim", [4, 60])  # fewer and more features than slides
def test_classes_are_logistic_regression(dim: int):
    x, rng = draw(40, dim)
    y = (x[:, 0].numpy() + rng.normal(size=40) > 0).astype(int) + (x[:, 1].numpy() > 1)
    task = Classification(("a", "b", "c"))
    for strength, weight, bias in solve(x, y.tolist(), task, (0.01, 1.0)):
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(x.numpy(), y)
        expected = model.predict_proba(x.numpy())
        found = torch.softmax(x @ weight.T + bias, 1).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_number_is_ridge_regression():
    x, rng = draw(30, 5)
    y = 3 * x[:, 0].numpy() + rng.normal(size=30)
    y = (y - y.mean()) / y.std()
    task = Regression(centre=0.0, scale=1.0)
    targets = [torch.tensor([value]) for value in y]
    for strength, weight, _ in solve(x, targets, task, (0.1, 1.0)):
        # mean squared error + |w|^2 / (2 C S), so that sklearn's alpha is 1 / (2 C)
        expected = Ridge(alpha=1 / (2 * strength)).fit(x.numpy(), y)
        np.testing.assert_allclose(weight[0].numpy(), expected.coef_, atol=1e-4)


def cox_gradient(x: np.ndarray, times: np.ndarray, events: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of the mean negative log partial likelihood (Breslow), event by event."""
    gradient = np.zeros_like(w)
    for i in np.flatnonzero(events):
        at_risk = times >= times[i]
        odds = np.exp(x[at_risk] @ w)
        gradient -= x[i] - (odds[:, None] * x[at_risk]).sum(0) / odds.sum()
    return gradient / events.sum()


@pytest.mark.parametrize("dim", [3, 50])
def test_survival_is_regularised_cox_regression(dim: int):
    """At the solution the gradient of an independently written likelihood is that of the penalty."""
    x, rng = draw(35, dim)
    times = np.exp(-x[:, 0].numpy()) * rng.exponential(size=35) + 0.1
    times[4] = times[9]  # a tie
    events = rng.random(35) < 0.7
    targets = [torch.tensor([t, float(e)]) for t, e in zip(times, events, strict=True)]
    sizes = []
    for strength, weight, bias in solve(x, targets, Cox(), (0.01, 0.1, 1.0)):
        w = weight[0].numpy()
        gradient = cox_gradient(x.numpy(), times, events, w) + w / (strength * 35)
        assert np.abs(gradient).max() < 2e-3 and abs(float(bias)) < 1e-3
        sizes.append(np.abs(w).sum())
    assert sizes == sorted(sizes)
    assert np.corrcoef(x.numpy() @ w, -np.log(times))[0, 1] > 0.5


def test_weights_of_slides_are_those_of_repeated_slides():
    x, _ = draw(12, 3)
    y = [0, 1] * 6
    task, shares = Classification(("a", "b")), torch.tensor([2.0, 1.0] * 6) / 1.5
    (_, weighed, _), *_ = solve(x, y, task, (1.0,), shares)
    repeated = torch.cat([x, x[::2]])
    # the penalty is divided by the number of slides
    (_, expected, _), *_ = solve(repeated, [*y, *[0] * 6], task, (12 / 18,))
    torch.testing.assert_close(weighed, expected, atol=1e-4, rtol=1e-3)


def test_links_are_the_inverse_of_the_tasks_predictions():
    shares = torch.tensor([0.2, 0.5, 0.3])
    task = Classification(("a", "b", "c"))
    found = task.predict(invert_link(shares, task.link)[None])[0]
    torch.testing.assert_close(found, shares)
    grades = Ordinal(("0", "1", "2"))
    found = grades.predict(invert_link(shares, grades.link)[None])[0]
    torch.testing.assert_close(found, shares, atol=1e-5, rtol=1e-5)
    assert torch.equal(grades.votes([2]), torch.tensor([[0.0, 0.0, 1.0]]))
    number = Regression(centre=5.0, scale=2.0)
    target = torch.tensor([9.0])
    found = number.predict(invert_link(number.votes([target])[0], number.link)[None])[0]
    torch.testing.assert_close(found.float(), target)
    labels = Multilabel(("a", "b", "c"))
    found = labels.predict(invert_link(shares, labels.link)[None])[0]
    torch.testing.assert_close(found, shares)
    tasks = (task, grades, number, labels, Discrete(edges=(1.0,)))
    assert {one.link for one in tasks} == set(LINKS) and Cox().link == "identity"


def test_the_neighbours_of_a_slide_make_its_life_table():
    """Hazard of an interval: events in it among the slides that are at risk in it."""
    task = Discrete(edges=(2.0, 4.0))  # three intervals
    followed = [(1.0, 1), (3.0, 1), (3.0, 0), (5.0, 1)]
    votes = task.votes([torch.tensor([t, float(e)]) for t, e in followed])
    logits = invert_link(votes.mean(0), task.link)
    expected = torch.tensor([1 / 4, 1 / 3, 1.0])
    torch.testing.assert_close(torch.sigmoid(logits), expected, atol=1e-5, rtol=1e-5)


def test_cox_neighbours_vote_with_martingale_residuals():
    followed = [(1.0, 1), (2.0, 0), (3.0, 1), (3.0, 1)]
    votes = Cox().votes([torch.tensor([t, float(e)]) for t, e in followed])
    by_hand = [1 - 1 / 4, -1 / 4, 1 - 1 / 4 - 2 / 2, 1 - 1 / 4 - 2 / 2]
    torch.testing.assert_close(votes[:, 0], torch.tensor(by_hand))
    assert abs(float(votes.sum())) < 1e-6  # as all residuals together


def keys_of(cohort: Path, output: Path, *more: str) -> list[str]:
    common = [f"labels={cohort}/labels.csv", f"output={output}", "device=cpu", "folds=3"]
    return [*common, "training.epochs=2", "training.min_epochs=0", *more]


@pytest.mark.parametrize("kind", ["classes", *COHORTS])
def test_probes_stand_in_the_benchmark_beside_trained_models(
    make_cohort: Callable[..., Path], tmp_path: Path, kind: str
):
    cohort = make_cohort(signal=6.0, slides=30)
    if kind != "classes":
        rewrite(cohort, kind)
    models = "models=[abmil,linear_probe,knn_probe]"
    keys = [f"features=[{cohort}/bags]", models, "seeds=[1]", "resamples=20"]
    keys += [f"task={kind}", "headline=linear_probe", "isolated=false", "intervals=2"]
    keys += ["options={knn_probe: {k: 5}}"]
    assert run(benchmark.main, benchmark.Config, keys_of(cohort, tmp_path / "b", *keys)) == 0
    with (tmp_path / "b" / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    tested = {}
    for row in rows:
        tested.setdefault(row["model"], []).append((row["fold"], row["slide_id"]))
    assert len({tuple(sorted(slides)) for slides in tested.values()}) == 1  # the same test slides
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    probe = summary["feature_sets"]["bags"]["linear_probe"]
    metric = summary["metric"]
    if kind != "ordinal":  # whose middle grades are too rare here
        assert probe[f"{metric}_ci"] is not None
    floor = {"classes": 0.9, "cox": 0.6, "discrete": 0.6, "regression": 0.5}.get(kind, 0.3)
    assert probe[f"{metric}_mean"] > floor
    neighbours = summary["feature_sets"]["bags"]["knn_probe"]
    assert neighbours[f"{metric}_mean"] > (0.0 if kind == "regression" else floor - 0.1)


@pytest.mark.parametrize("name", list(PROBES))
@pytest.mark.parametrize("standardize", [False, True])
def test_a_probe_is_rebuilt_from_its_checkpoint_alone(
    make_cohort: Callable[..., Path], tmp_path: Path, name: str, standardize: bool
):
    cohort = make_cohort(signal=6.0)
    keys = [f"features={cohort}/bags", f"model={name}", f"standardize={standardize}"]
    keys = keys_of(cohort, tmp_path / "t", *keys)
    assert run(train.main, train.Config, keys) == 0
    model, content = load_trained_model(tmp_path / "t" / "checkpoint_best.pt", torch.device("cpu"))
    assert content["config"]["network"]["name"] == name
    with (tmp_path / "t" / "predictions.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    for row in rows:
        bag = read_bag(cohort / "bags" / "h5_files" / f"{row['slide_id']}.h5")
        with torch.no_grad():
            output = model(bag.read())
        probability = float(torch.softmax(output.logits, 0)[1])
        assert probability == pytest.approx(float(row["prob_pos"]), abs=1e-5)
        torch.testing.assert_close(output.attention.sum(), torch.tensor(1.0))
    lines = (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()
    strengths = [json.loads(line)["strength"] for line in lines]
    assert strengths == ([0.001, 0.01, 0.1, 1.0, 10.0] if name == "linear_probe" else [0.0])
    # a finished run is kept
    assert run(train.main, train.Config, keys) == 0


def test_votes_are_those_of_the_tile_probe():
    """The same neighbours and weights as patch_encoder's k-NN probe, on centred vectors."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 6)).astype(np.float32), rng.integers(0, 3, 30)
    model = build("knn_probe", 6, 3, k=7, slides=30, link="softmax")
    model.slides.copy_(torch.from_numpy(x))
    model.mean.copy_(torch.from_numpy(x).mean(0))
    model.answers.copy_(torch.eye(3)[torch.from_numpy(y)])
    bag = rng.normal(size=(1, 6)).astype(np.float32)
    expected = knn_probe(x - x.mean(0), y, bag - x.mean(0), 3, k=7)
    found = torch.softmax(model(torch.from_numpy(bag)).logits, 0)
    np.testing.assert_allclose(found.numpy(), expected[0], atol=1e-4)
