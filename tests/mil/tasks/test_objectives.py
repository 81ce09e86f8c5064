"""Losses of the tasks against loops and libraries, their labels, and every model trained on every
task.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from mil import evaluate
from mil.benchmark import Config as BenchmarkConfig
from mil.benchmark import main as benchmark_main
from mil.datasets.bags import Sample
from mil.losses.classification import class_loss, corn_loss, corn_probabilities, label_loss
from mil.losses.survival import cox_loss, discrete_loss, discrete_risk
from mil.models import MODELS, build
from mil.models.output import MILOutput
from mil.tasks.base import Task
from mil.tasks.classification import Classification
from mil.tasks.cox import Cox
from mil.tasks.discrete import Discrete, interval_edges
from mil.tasks.multilabel import Multilabel
from mil.tasks.ordinal import Ordinal
from mil.tasks.records import TaskOptions
from mil.tasks.regression import Regression
from mil.tasks.slide_targets import SlideTargets
from mil.tasks.table import TASKS, fit_task, read_targets, task_from_dict
from mil.train import Config, main
from mil.training.engine import load_trained_model, train_one_epoch
from mil.training.prediction import predict
from mil.training.recipes import Recipe, check_recipe
from patch_encoder.bags.bag import make_bag
from tests.mil.models.small_options import SMALL
from tests.mil.tasks.task_cohorts import COHORTS, rewrite
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError

CPU = World(0, 1, torch.device("cpu"))
GENERATOR = np.random.default_rng(0)
TIMES = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 3.0, 2.0, 6.0])
EVENTS = np.array([1, 1, 0, 1, 1, 0, 0, 1], dtype=bool)
FITTED: dict[str, Task] = {
    "classes": Classification(("a", "b", "c")),
    "multilabel": Multilabel(("a", "b", "c"), weights=(1.0, 2.0, 0.5)),
    "ordinal": Ordinal(("0", "1", "2", "3")),
    "cox": Cox(),
    "discrete": Discrete(edges=(2.0, 4.0), alpha=0.25),
    "regression": Regression(centre=40.0, scale=8.0, criterion="huber"),
}
TARGETS = {
    "classes": [0, 1, 2, 0],
    "multilabel": [
        torch.tensor(v)
        for v in ([1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0])
    ],
    "ordinal": [0, 3, 1, 2],
    "cox": [torch.tensor(v) for v in ([1.0, 1.0], [3.0, 0.0], [2.0, 1.0], [5.0, 1.0])],
}
TARGETS["discrete"] = TARGETS["cox"]
TARGETS["regression"] = [torch.tensor([value]) for value in (30.0, 50.0, 41.0, 35.0)]


def test_class_loss_smooths_and_focuses():
    logits = torch.randn(4)
    expected = cross_entropy(logits[None], torch.tensor([2]), label_smoothing=0.2)
    torch.testing.assert_close(class_loss(logits, 2, 0.2), expected)
    p = logits.softmax(0)[2]
    torch.testing.assert_close(class_loss(logits, 2, focal=2.0), -((1 - p) ** 2) * p.log())


def test_label_loss_is_torchs_and_focal_by_hand():
    logits, target, weights = (
        torch.randn(3),
        torch.tensor([1.0, 0.0, 1.0]),
        torch.tensor([1.0, 3.0, 0.5]),
    )
    torch.testing.assert_close(
        label_loss(logits, target, weights),
        binary_cross_entropy_with_logits(logits, target, pos_weight=weights),
    )
    p = torch.where(target > 0, logits.sigmoid(), 1 - logits.sigmoid())
    torch.testing.assert_close(
        label_loss(logits, target, focal=2.0), (-((1 - p) ** 2) * p.log()).mean()
    )
    soft = torch.tensor([0.9, 0.1, 0.9])
    torch.testing.assert_close(
        label_loss(logits, target, smoothing=0.2), binary_cross_entropy_with_logits(logits, soft)
    )


@pytest.mark.parametrize("grade", [0, 1, 2, 3])
def test_corn_is_the_likelihood_of_the_grade(grade: int):
    logits = torch.tensor([0.7, -0.3, 1.1])
    h = logits.sigmoid().tolist()
    by_hand = [1 - h[0], h[0] * (1 - h[1]), h[0] * h[1] * (1 - h[2]), h[0] * h[1] * h[2]]
    np.testing.assert_allclose(corn_probabilities(logits[None])[0], by_hand, rtol=1e-6)
    assert float(corn_loss(logits, grade)) == pytest.approx(-math.log(by_hand[grade]), rel=1e-5)


def test_cox_is_breslows_loop():
    risks = GENERATOR.normal(size=8)
    loss = 0.0
    for i in np.flatnonzero(EVENTS):  # two events at time 1, an event and a censored one at time 3
        loss -= risks[i] - math.log(
            sum(math.exp(risks[j]) for j in range(8) if TIMES[j] >= TIMES[i])
        )
    found = cox_loss(torch.from_numpy(risks), torch.from_numpy(TIMES), torch.from_numpy(EVENTS))
    assert float(found) == pytest.approx(loss / EVENTS.sum(), rel=1e-5)
    none = torch.zeros(3, requires_grad=True)
    cox_loss(none, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False] * 3)).backward()
    assert none.grad is not None and not none.grad.any()


def test_discrete_likelihood_by_hand():
    logits = torch.tensor([0.2, -1.0, 0.5])
    h = logits.sigmoid().tolist()
    assert float(discrete_loss(logits, 1, True)) == pytest.approx(
        -math.log((1 - h[0]) * h[1]), rel=1e-5
    )
    assert float(discrete_loss(logits, 1, False)) == pytest.approx(
        -math.log((1 - h[0]) * (1 - h[1])), rel=1e-5
    )
    assert float(discrete_loss(logits, 1, False, 0.4)) == pytest.approx(
        -0.6 * math.log((1 - h[0]) * (1 - h[1])), rel=1e-5
    )
    survival = np.cumprod([1 - x for x in h])
    assert float(discrete_risk(logits[None])[0]) == pytest.approx(-survival.sum(), rel=1e-5)


def test_alpha_weighs_the_censored_slides_of_the_task():
    logits, plain = torch.tensor([0.2, -1.0, 0.5]), Discrete(edges=(2.0, 4.0))
    died, left = torch.tensor([3.0, 1.0]), torch.tensor([3.0, 0.0])
    for alpha in (0.0, 0.4, 1.0):
        task = Discrete(edges=(2.0, 4.0), alpha=alpha)
        torch.testing.assert_close(task.loss(logits, left), (1 - alpha) * plain.loss(logits, left))
        torch.testing.assert_close(task.loss(logits, died), plain.loss(logits, died))


@pytest.mark.process
def test_alpha_goes_through_training_and_benchmark(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cohort = rewrite(make_cohort(slides=32), "discrete")
    shared = [
        f"labels={cohort}/labels.csv",
        "device=cpu",
        "folds=2",
        "training.epochs=2",
        "task=discrete",
        "intervals=2",
    ]
    said = {}
    for name, more in (
        ("plain", []),
        ("zero", ["censored_alpha=0"]),
        ("half", ["censored_alpha=0.5"]),
    ):
        config = load_config(
            Config,
            [*shared, f"features={cohort}/bags", f"output={tmp_path}/{name}", "model=max", *more],
        )
        assert main(config) is None
        said[name] = (tmp_path / name / "predictions.csv").read_text()
        content = load_trained_model(tmp_path / name / "checkpoint_best.pt", CPU.device)[1]
        assert task_from_dict(content["config"]["task"]).alpha == (0.5 if name == "half" else 0.0)
    assert said["plain"] == said["zero"] != said["half"]
    grid = [
        *shared,
        f"features=[{cohort}/bags]",
        f"output={tmp_path}/all",
        "models=[max]",
        "headline=max",
        "seeds=[2024]",
    ]
    assert (
        benchmark_main(load_config(BenchmarkConfig, [*grid, "resamples=20", "censored_alpha=0.5"]))
        == 0
    )
    assert (tmp_path / "all/runs/bags/max/seed2024_fold0/predictions.csv").read_text() == said[
        "half"
    ]
    refused = [
        *shared,
        f"features={cohort}/bags",
        f"output={tmp_path}/none",
        "model=max",
        "censored_alpha=2",
    ]
    assert run_script(main, Config, refused) == 2 and not (tmp_path / "none").exists()
    assert "censored_alpha=2.0: expected a share" in capsys.readouterr().err


def test_what_logits_mean():
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(Classification(("a", "b", "c")).predict(logits), logits.softmax(1))
    torch.testing.assert_close(Multilabel(("a", "b", "c")).predict(logits), logits.sigmoid())
    grades = Ordinal(("1", "2", "3", "4"))
    above = logits.sigmoid().cumprod(1)  # P(y > k) = P(y > k | y > k - 1) P(y > k - 1)
    said = grades.predict(logits)
    torch.testing.assert_close(said.flip(1).cumsum(1).flip(1)[:, 1:], above)
    torch.testing.assert_close(said.sum(1), torch.ones(20, dtype=torch.float64))
    assert torch.equal(Cox().predict(logits[:, :1]), logits[:, :1])
    assert grades.outputs == 3 and Discrete(edges=(1.0, 2.0)).outputs == 3 and Cox().outputs == 1


def test_epochs_are_compared_by_what_evaluation_reports():
    """Harrell's index against a loop over pairs, quadratic kappa of the median grade against
    scikit-learn.
    """
    risks = torch.tensor([0.1, 0.9, 0.1, 0.3, 0.2, 0.5, 0.5, 0.0])
    wins = pairs = 0.0
    for i, j in itertools.permutations(range(8), 2):
        if EVENTS[i] and (TIMES[i] < TIMES[j] or (TIMES[i] == TIMES[j] and not EVENTS[j])):
            pairs += 1
            wins += 1.0 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0.0
    aims = [torch.tensor([time, float(event)]) for time, event in zip(TIMES, EVENTS, strict=True)]
    assert Cox().measure(risks[:, None], aims)["c_index"] == pytest.approx(wins / pairs)
    task, targets = Ordinal(("1", "2", "3", "4")), GENERATOR.integers(0, 4, 30)
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(2))
    called = (task.predict(logits).cumsum(1) >= 0.5).int().argmax(1)
    expected = cohen_kappa_score(targets, called, weights="quadratic", labels=range(4))
    assert task.measure(logits, targets.tolist())["kappa"] == pytest.approx(expected)


def test_intervals_hold_about_as_many_events():
    times = GENERATOR.exponential(size=100)
    edges = interval_edges(times, times < 2, 4)
    counts = np.bincount(np.searchsorted(edges, times[times < 2], side="right"))
    assert len(edges) == 3 and counts.max() - counts.min() <= 1
    with pytest.raises(UserError, match="intervals=4: expected event times .* that fill"):
        interval_edges(np.ones(9), np.ones(9, dtype=bool), 4)
    # most events at the first time: it is an interval of its own
    ties = np.array([1.0, 1.0, 1.0, 9.0, 9.0])
    assert interval_edges(ties, np.ones(5, dtype=bool), 2) == (9.0,)
    task = Discrete(edges=(2.0, 4.0))
    assert [task.interval(torch.tensor([t, 1.0])) for t in (1.9, 2.0, 3.9, 4.0)] == [0, 1, 1, 2]


def test_told_is_what_the_outputs_are_evidence_for():
    assert FITTED["classes"].evidence(2) == 2
    assert FITTED["ordinal"].evidence(2).tolist() == [1, 1, 0]
    assert FITTED["cox"].evidence(torch.tensor([1.0, 1.0])).tolist() == [1]
    assert FITTED["discrete"].evidence(torch.tensor([3.0, 1.0])).tolist() == [0, 1, 0]
    assert FITTED["discrete"].evidence(torch.tensor([3.0, 0.0])).tolist() == [0, 0, 0]


def test_cox_over_streams_is_the_weighted_sum_and_small_bags_fall_back_on_their_logits():
    risks = torch.randn(3, 3)
    aims = [torch.tensor(v) for v in ([1.0, 1.0], [2.0, 1.0], [3.0, 0.0])]
    outputs = [
        MILOutput(r[:1], torch.ones(1), ((r[1:2], 0.7), (r[2:], 0.3)), torch.tensor(0.6))
        for r in risks
    ]
    outputs[2] = MILOutput(risks[2][:1], torch.ones(1), ((risks[2][1:2], 0.7),), torch.tensor(0.3))
    times, events = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False])
    second = torch.stack([risks[0, 2], risks[1, 2], risks[2, 0]])
    expected = (
        0.7 * cox_loss(risks[:, 1], times, events) + 0.3 * cox_loss(second, times, events) + 0.5
    )
    torch.testing.assert_close(Cox().step_loss(outputs, aims), expected)


@pytest.mark.parametrize("kind", list(FITTED))
@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_trains_on_every_task(name: str, kind: str):
    task = FITTED[kind]
    torch.manual_seed(0)
    places = torch.tensor([(x, y) for y in range(3) for x in range(4)])
    bags = [
        Sample(str(i), make_bag(torch.randn(12, 6), places), target, i % 2)
        for i, target in enumerate(TARGETS[kind])
    ]
    model = build(name, 6, task.outputs, dropout=0.0, **SMALL[name])
    recipe = Recipe(accumulate=4, epochs=1, balanced=True)
    before = {key: value.clone() for key, value in model.named_parameters()}
    loss = train_one_epoch(
        model, bags, torch.optim.SGD(model.parameters(), 0.1), recipe, CPU, [2, 0, 3, 1], 0, task
    )
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert math.isfinite(loss) and any("head" in key or "tile" in key for key in moved)
    logits = predict(model, bags, CPU.device)
    assert logits.shape == (4, task.outputs) and set(task.measure(logits, TARGETS[kind])) == {
        task.score,
        "loss",
    }
    said = task.predict(logits)
    assert said.shape == (4, len(task.names) or 1)
    if kind in ("classes", "ordinal"):
        torch.testing.assert_close(said.sum(1), torch.ones(4))
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_what_does_not_go_together_is_refused():
    with pytest.raises(
        UserError, match="task=cox: expected one process and training.accumulate of 2 or more"
    ):
        check_recipe(Recipe(), FITTED["cox"], CPU)
    with pytest.raises(UserError, match="expected one process"):
        check_recipe(Recipe(accumulate=4), FITTED["cox"], World(0, 2, torch.device("cpu")))
    others = {
        "cox": TaskOptions(censored_alpha=0.5),
        "ordinal": TaskOptions(label_smoothing=0.1),
        "discrete": TaskOptions(class_weights=True),
        "regression": TaskOptions(focal=1.0),
        "classes": TaskOptions(regression_loss="huber"),
    }
    for kind, options in others.items():
        (name,) = (key for key, value in vars(options).items() if value != vars(TaskOptions())[key])
        with pytest.raises(UserError, match=f"task={kind} does not support {name}, an option of"):
            fit_task(SlideTargets(TASKS[kind](), {}), [], options)
    with pytest.raises(UserError, match="expected 0 <= label_smoothing < 1"):
        Multilabel(("a", "b"), smoothing=1.0)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(
            UserError, match=r"censored_alpha=.*: expected a share, 0 <= censored_alpha <= 1"
        ):
            Discrete(edges=(1.0,), alpha=share)


@pytest.mark.process
@pytest.mark.parametrize("kind", list(COHORTS))
def test_a_run_of_every_task_from_its_labels(make_cohort, tmp_path: Path, kind: str):
    cohort = rewrite(make_cohort(slides=48, signal=5.0), kind)
    more = [
        "device=cpu",
        "training.epochs=15",
        "training.min_epochs=15",
        "training.lr=3e-3",
        "folds=2",
        "training.accumulate=4",
    ]
    more += ["intervals=2", f"task={kind}", "dropout=0.0"]
    config = load_config(
        Config,
        [f"labels={cohort}/labels.csv", f"features={cohort}/bags", f"output={tmp_path}/run", *more],
    )
    assert main(config) is None
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    scores = {"multilabel": "auc", "ordinal": "kappa", "regression": "r2"}
    score = scores.get(kind, "c_index")
    assert (
        results["task"] == kind
        and math.isfinite(results[f"val_{score}"])
        and score in results["test"]
    )
    with (tmp_path / "run" / "predictions.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    if score == "c_index":  # the easy signal is found
        assert results["test"]["c_index"] > 0.7
    elif kind == "regression":
        assert results["test"]["r2"] > 0.6
    elif kind == "ordinal":
        below = np.cumsum([[float(row[f"prob_{g}"]) for g in range(4)] for row in rows], axis=1)
        assert [row["predicted"] for row in rows] == [str(g) for g in (below >= 0.5).argmax(1)]
    else:
        assert all((float(row["prob_a"]) >= 0.5) == ("a" in row["predicted"]) for row in rows)
    # mil.evaluate reads what mil.train wrote, and finds the same figure
    table = f"predictions=[{tmp_path}/run/predictions.csv]"
    given = [table, f"task={kind}", f"output={tmp_path}/evaluation", "resamples=20"]
    assert run_script(evaluate.main, evaluate.Config, given) == 0
    with (tmp_path / "evaluation" / "results.csv").open() as stream:
        (judged,) = csv.DictReader(stream)
    name = {"multilabel": "auc_macro", "ordinal": "kappa_quadratic"}.get(kind, score)
    assert float(judged[name]) == pytest.approx(results["test"][score], abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("cox", "c,x,-1,1,train", r"line 2 \(slide x\): expected a time > 0 .*found '-1'"),
        ("cox", "c,x,nan,1,train", "expected a time > 0"),
        (
            "discrete",
            "c,x,3,dead,train",
            r"slide x\): expected event 1 \(it happened\) or 0 \(censored\), found 'dead'",
        ),
        (
            "ordinal",
            "c,x,high,,train",
            "slide x: expected a grade that is a whole number, found 'high'",
        ),
        ("multilabel", "c,x,a||b,,train", r"slide x: expected different labels joined by '\|'"),
    ],
)
def test_a_cell_that_is_no_target_is_named(tmp_path: Path, kind: str, row: str, message: str):
    header = (
        "case_id,slide_id,time,event,split"
        if kind in ("cox", "discrete")
        else "case_id,slide_id,label,extra,split"
    )
    (tmp_path / "labels.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(UserError, match=message):
        read_targets(tmp_path / "labels.csv", kind)


def test_a_patient_has_one_follow_up(tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.write_text("case_id,slide_id,time,event\nc1,s1,5,1\nc2,s2,4,0\nc1,s3,5,0\n")
    with pytest.raises(UserError, match=r"case c1: .*found 5 \(event\) on slide s1 and 5 \(cens"):
        read_targets(table, "cox")


def test_targets_name_columns_grades_and_doubles(tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.write_text("case_id,slide_id,label\nc1,s1,low\nc2,s2,high\nc3,s3,mid\n")
    _, targets = read_targets(table, "ordinal", grades=["low", "mid", "high"])
    assert [targets.of(s) for s in ("s1", "s2", "s3")] == [0, 2, 1]
    with pytest.raises(
        UserError, match="expected one of the grades, found 'mid'; valid: high, low"
    ):
        read_targets(table, "ordinal", grades=["low", "high"])
    with pytest.raises(UserError, match="'time' is missing"):
        read_targets(table, "cox")
    table.write_text("case_id,slide_id,time,event\nc1,s1,2,1\nc2,s2,3,0\nc2,s2,3,0\n")
    with pytest.raises(UserError, match="found 's2' more than once"):
        read_targets(table, "cox")
    table.write_text("case_id,slide_id,label\nc1,s1,a|b\nc2,s2,-\nc3,s3,a\n")
    slides, targets = read_targets(table, "multilabel")
    assert [targets.of(s).tolist() for s in ("s1", "s2", "s3")] == [[1, 1], [0, 0], [1, 0]]
    assert [record.label for record in slides.records] == ["b", "-", "a"]  # the rarest
    assert fit_task(targets, ["s1", "s2", "s3"], TaskOptions(class_weights=True)).weights == (
        0.5,
        2.0,
    )
