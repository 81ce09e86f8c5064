"""Training: what it learns and does not, resume bit for bit, selection and threshold from
validation slides.
"""

from __future__ import annotations

import csv
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

import mil.training.engine as engine
import mil.training.fold_run as jobs
from mil.datasets.bags import Sample, find_bags, load_bags
from mil.losses.classification import class_loss
from mil.models import build
from mil.tasks.classification import METRICS
from mil.tasks.cox import Cox
from mil.tasks.discrete import Discrete
from mil.train import Config, build_job, main
from mil.training.engine import load_trained_model, train_one_epoch
from mil.training.epochs import class_weights, is_better, is_over
from mil.training.recipes import Recipe
from patch_encoder.bags.bag import make_bag, read_bag
from patch_encoder.bags.writer import write_bag
from wsi_common.checkpoint import load_checkpoint
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.metrics.classification import youden_threshold
from wsi_common.run import Run

CPU = World(0, 1, torch.device("cpu"))
SMALL = (
    "device=cpu",
    "training.epochs=6",
    "training.min_epochs=6",
    "training.save_every=2",
    "folds=3",
    "training.lr=1e-3",
)


def arguments(cohort: Path, output: Path, *more: str) -> list[str]:
    return [
        f"labels={cohort}/labels.csv",
        f"features={cohort}/bags",
        f"output={output}",
        *SMALL,
        *more,
    ]


def train(cohort: Path, output: Path, *more: str) -> dict:
    assert main(load_config(Config, arguments(cohort, output, *more))) is None
    return json.loads((output / "results.json").read_text())


def scale_bag(path: Path, factor: float) -> None:
    bag = read_bag(path)
    write_bag(path, bag.features * np.float32(factor), bag.coords, {})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_files(first: Path, second: Path) -> None:
    for name in ("results.json", "predictions.csv", "metrics.jsonl"):
        assert (first / name).read_text() == (second / name).read_text(), name
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        for key, tensor in weights(first / name).items():
            assert torch.equal(tensor, weights(second / name)[key]), (name, key)


def samples(count: int = 6, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(f"s{i}", make_bag(torch.randn(4 + i, 5, generator=generator)), i % 2)
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["mean", "max", "abmil", "gated_abmil"])
def test_every_model_trains_and_leaves_a_whole_run_directory(
    make_cohort, tmp_path: Path, name: str
):
    results = train(make_cohort(), tmp_path / "run", f"model={name}", "standardize=true")
    assert {*METRICS, "loss"} == set(results["test"])
    files = {
        "config.yaml",
        "metrics.jsonl",
        "checkpoint_last.pt",
        "checkpoint_best.pt",
        "results.json",
        "environment.json",
    }
    assert files | {"predictions.csv"} <= {p.name for p in (tmp_path / "run").iterdir()}
    model, content = load_trained_model(
        tmp_path / "run" / "checkpoint_best.pt", torch.device("cpu")
    )
    assert (
        content["config"]["task"]["names"] == ["neg", "pos"]
        and content["epoch"] == results["best_epoch"]
    )
    with (tmp_path / "run" / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["split"] for row in rows} == {"val", "test"}
    val = [row for row in rows if row["split"] == "val"]
    positive, scores = (
        np.array([row["label"] == "pos" for row in val]),
        np.array([float(row["prob_pos"]) for row in val]),
    )
    assert results["val_auc"] == pytest.approx(roc_auc_score(positive, scores))
    assert results["threshold"] == pytest.approx(youden_threshold(positive, scores))
    for row in rows:
        bag = read_bag(tmp_path / "cohort" / "bags" / "h5_files" / f"{row['slide_id']}.h5")
        with torch.no_grad():
            probability = model(bag.features, bag.coords).logits.softmax(0)[1]
        assert float(row["prob_pos"]) == pytest.approx(float(probability), rel=1e-5)
        assert (row["predicted"] == "pos") == (float(row["prob_pos"]) >= results["threshold"])


@pytest.mark.process
def test_attention_separates_an_easy_problem_and_not_shuffled_labels(make_cohort, tmp_path: Path):
    more = ("model=abmil", "training.epochs=12", "training.lr=1e-3", "folds=3")
    easy = make_cohort(slides=60, signal=5.0, name="easy")
    assert train(easy, tmp_path / "easy_run", *more)["test"]["auc"] > 0.95
    # the control: the same pictures, labels that have nothing to do with them
    none = make_cohort(slides=60, signal=0.0, name="none")
    assert 0.2 < train(none, tmp_path / "none_run", *more)["test"]["auc"] < 0.8


def test_other_settings_or_bags_need_overwrite(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cohort = make_cohort()
    train(cohort, tmp_path / "run")
    assert run_script(main, Config, arguments(cohort, tmp_path / "run", "dropout=0.5")) == 2
    assert "dropout 0.25 -> 0.5" in capsys.readouterr().err
    scale_bag(cohort / "bags" / "h5_files" / "s00.h5", 2)
    assert run_script(main, Config, arguments(cohort, tmp_path / "run")) == 2
    assert "inputs.features" in capsys.readouterr().err
    assert run_script(main, Config, arguments(cohort, tmp_path / "run", "overwrite=true")) == 0


def test_test_slides_decide_nothing(make_cohort, tmp_path: Path):
    """Other test bags and labels change the predictions, and neither weights, best epoch nor
    threshold.
    """
    cohort = make_cohort(signal=1.0)
    more = ("fold=1", "training.epochs=8")
    before = train(cohort, tmp_path / "before", *more)
    job = build_job(load_config(Config, arguments(cohort, tmp_path / "unused", *more)))
    for slide in job.split.test:
        scale_bag(cohort / "bags" / "h5_files" / f"{slide}.h5", -3)
    after = train(cohort, tmp_path / "after", *more)
    assert after["test"] != before["test"]
    assert {k: v for k, v in after.items() if k != "test"} == {
        k: v for k, v in before.items() if k != "test"
    }
    for key, tensor in weights(tmp_path / "before" / "checkpoint_best.pt").items():
        assert torch.equal(tensor, weights(tmp_path / "after" / "checkpoint_best.pt")[key])


def test_standardisation_sees_training_slides_only(make_cohort, tmp_path: Path):
    cohort = make_cohort()
    train(cohort, tmp_path / "run", "standardize=true")
    job = build_job(load_config(Config, arguments(cohort, tmp_path / "run", "standardize=true")))
    features = np.concatenate(
        [read_bag(dict(job.files)[slide]).read().numpy() for slide in job.split.train]
    )
    stored = weights(tmp_path / "run" / "checkpoint_best.pt")
    np.testing.assert_allclose(stored["mean"].numpy(), features.mean(0), atol=1e-5)
    np.testing.assert_allclose(stored["std"].numpy(), features.std(0), rtol=1e-5)


def test_fixed_protocol_uses_the_column(make_cohort, tmp_path: Path):
    cohort = make_cohort()
    (cohort / "labels.csv").write_text(
        (cohort / "labels.csv").read_text() + "x,unseen,pos,pretrain\n"
    )
    train(cohort, tmp_path / "run", "protocol=fixed", "subset=train,test")
    with (tmp_path / "run" / "predictions.csv").open() as stream:
        tested = [row["slide_id"] for row in csv.DictReader(stream) if row["split"] == "test"]
    with (cohort / "labels.csv").open() as stream:
        assert (
            tested
            == [row["slide_id"] for row in csv.DictReader(stream) if row["split"] == "test"]
            != []
        )


def test_accumulated_step_is_the_mean_gradient_of_its_bags():
    bags = samples(5)
    model = build("abmil", 5, 2, dropout=0.0)
    twin = build("abmil", 5, 2, dropout=0.0)
    twin.load_state_dict(model.state_dict())
    order = [3, 1, 4, 0, 2]
    loss = train_one_epoch(
        model, bags, torch.optim.SGD(model.parameters(), 0.1), Recipe(accumulate=2), CPU, order
    )
    optimizer, losses = torch.optim.SGD(twin.parameters(), 0.1), []
    for group in ([3, 1], [4, 0], [2]):
        optimizer.zero_grad()
        each = [
            cross_entropy(twin(bags[i].bag.read()).logits[None], torch.tensor([bags[i].target]))
            for i in group
        ]
        torch.stack(each).mean().backward()
        optimizer.step()
        losses += [float(value.detach()) for value in each]
    for first, second in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(first, second)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_class_weights_are_inverse_frequencies_with_mean_one():
    bags = [Sample(str(i), make_bag(torch.zeros(1, 1)), int(i < 2)) for i in range(8)]
    assert class_weights(bags) == {1: 2.0, 0: pytest.approx(2 / 3)}
    assert np.mean([class_weights(bags)[s.target] for s in bags]) == pytest.approx(1.0)
    model, heavy = build("mean", 1, 2, dropout=0.0), build("mean", 1, 2, dropout=0.0)
    heavy.load_state_dict(model.state_dict())
    for net, weighted in ((model, False), (heavy, True)):
        train_one_epoch(
            net,
            bags,
            torch.optim.SGD(net.parameters(), 0.1),
            Recipe(class_weights=weighted),
            CPU,
            [0],
        )
    start = torch.zeros(2)
    torch.testing.assert_close(heavy.tile[3].bias - start, 2 * (model.tile[3].bias - start))


def test_class_loss_is_cross_entropy():
    assert float(class_loss(torch.tensor([0.0, math.log(3.0)]), 1)) == pytest.approx(
        -math.log(0.75)
    )


def test_selection_prefers_auc_then_loss():
    best = {"auc": 0.8, "loss": 0.5, "epoch": 3}
    assert is_better({"auc": 0.9, "loss": 9.0}, best) and is_better({"auc": 0.8, "loss": 0.4}, best)
    assert not is_better({"auc": 0.8, "loss": 0.5}, best) and not is_better(
        {"auc": 0.7, "loss": 0.1}, best
    )
    assert is_better({"auc": 0.0, "loss": 1.0}, {})
    unknown = {"auc": math.nan, "loss": 0.5}
    assert is_better({"auc": 0.0, "loss": 1.0}, unknown) and not is_better(
        unknown, {"auc": 0.0, "loss": 1.0}
    )
    assert is_better({"auc": math.nan, "loss": 0.4}, unknown) and not is_better(
        {"auc": math.nan, "loss": 0.6}, unknown
    )


@pytest.mark.parametrize(("smoothing", "best"), [[0.0, 2], [0.6, 5]])
def test_the_epoch_is_chosen_by_the_smoothed_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoothing: float, best: int
):
    """A lucky second epoch is the best one only where scores are not averaged."""
    scores = iter([0.5, 0.9, 0.6, 0.8, 0.8, 0.7])
    monkeypatch.setattr(
        engine, "validate", lambda *_: {"auc": next(scores), "loss": 1.0, "threshold": 0.5}
    )
    run = Run(tmp_path, None, None, True)
    recipe = Recipe(epochs=6, min_epochs=6, smoothing=smoothing, lr=1e-3)
    found = engine.train_model(build("mean", 5, 2), samples(), samples(), recipe, 0, run, {}, CPU)
    assert found["epoch"] == best
    assert load_checkpoint(run.best, "a checkpoint")["epoch"] == best


def test_an_epoch_draws_tiles_of_its_own(monkeypatch: pytest.MonkeyPatch):
    seen, load = [], Sample.load
    monkeypatch.setattr(
        Sample,
        "load",
        lambda bag, tiles=None: (seen.append(tuple(tiles.tolist())), load(bag, tiles))[1],
    )
    bags = [Sample(f"s{i}", make_bag(torch.randn(40, 5)), i % 2) for i in range(3)]
    model, recipe = build("mean", 5, 2), Recipe(max_tiles=6)
    for epoch in (0, 1, 0):
        train_one_epoch(
            model,
            bags,
            torch.optim.SGD(model.parameters(), 0.0),
            recipe,
            CPU,
            range(3),
            epoch,
            seed=4,
        )
    assert len(set(seen)) == 6 and seen[:3] == seen[6:]


def test_validation_slides_that_cannot_be_ranked(caplog: pytest.LogCaptureFixture):
    """The only event is the last thing that happens: no pair is comparable."""
    aims = [(3.0, 0.0), (5.0, 0.0), (9.0, 1.0)]
    targets = [torch.tensor(aim) for aim in aims]
    with pytest.raises(
        UserError,
        match=r"3 validation slides, among which val_c_index has nothing to compare; expected an "
        r"event",
    ):
        engine.check_validation(targets, Cox())
    engine.check_validation(targets, Discrete(edges=(4.0,)))
    assert "the best epoch is the one with the lowest loss" in caplog.text
    caplog.clear()
    targets.append(torch.tensor((12.0, 0.0)))
    engine.check_validation(targets, Cox())
    assert not caplog.text


def test_early_stopping_waits_for_patience_and_min_epochs():
    recipe = Recipe(epochs=200, patience=20, min_epochs=70)
    assert not is_over(69, {"epoch": 1}, recipe) and is_over(70, {"epoch": 50}, recipe)
    assert (
        not is_over(70, {"epoch": 51}, recipe)
        and is_over(200, {"epoch": 199}, recipe)
        and not is_over(0, {}, recipe)
    )


def test_early_stopping_ends_a_run(make_cohort, tmp_path: Path):
    results = train(
        make_cohort(signal=6.0),
        tmp_path / "run",
        "training.epochs=60",
        "training.patience=1",
        "training.min_epochs=2",
        "training.lr=0.0",
    )
    assert results["epochs"] == 2 and results["best_epoch"] == 1


def test_loss_that_is_not_finite_names_the_slide():
    bags = samples(2)
    bags[1].bag.read()[0, 0] = float("nan")
    model = build("mean", 5, 2)
    with pytest.raises(UserError, match="slide s1: expected a finite loss, found nan"):
        train_one_epoch(
            model, bags, torch.optim.SGD(model.parameters(), 0.1), Recipe(), CPU, [0, 1]
        )


def test_bf16_trains(make_cohort, tmp_path: Path):
    assert train(make_cohort(), tmp_path / "run", "training.precision=bf16")["epochs"] == 6


def test_processes_of_torchrun_share_the_memory(
    make_cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load_config(Config, arguments(make_cohort(), tmp_path / "unused"))
    monkeypatch.setattr("mil.datasets.bags.free_memory", lambda: 8000)
    assert build_job(config).memory == 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert build_job(config).memory == 1000


def test_the_next_feature_set_comes_when_the_last_one_has_gone(
    make_cohort, monkeypatch: pytest.MonkeyPatch
):
    sets = [find_bags(make_cohort(name, slides=4) / "bags", ["s00", "s01"]) for name in ("a", "b")]
    alive: list[weakref.ref] = []

    def load(files, memory):
        assert not any(bag() for bag in alive)
        bags = load_bags(files, memory)
        alive.append(weakref.ref(bags["s00"]))
        return bags

    monkeypatch.setattr(jobs, "load_bags", load)
    for files in (sets[0], sets[0], sets[1], sets[0]):
        jobs.cached_bags(tuple(files.items()), "digest")
    assert len(alive) == 3


def test_bad_fold_and_foreign_checkpoint_are_refused(make_cohort, tmp_path: Path):
    with pytest.raises(UserError, match="fold=3: expected 0 to 2"):
        build_job(load_config(Config, arguments(make_cohort(), tmp_path / "run", "fold=3")))
    torch.save({"model": {}, "config": {"other": 1}, "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="expected a slide classifier's checkpoint"):
        load_trained_model(tmp_path / "x.pt", torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes."),
    ],
)
@pytest.mark.parametrize("where", ["train_one_epoch", "validate"])
def test_a_bag_that_is_too_large_for_the_memory_is_one_line(
    make_cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    where: str,
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine, where, fail)
    cohort = make_cohort()
    assert run_script(main, Config, arguments(cohort, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(error)[:20] in said
    assert "bags of up to 12 tiles" in said and "training.max_tiles=6" in said


def test_going_on_with_other_threads_is_reported(
    make_cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cohort = make_cohort()
    train(cohort, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    train(cohort, tmp_path / "run")
    assert "threads=" not in caplog.text  # the same number
    (tmp_path / "run" / "results.json").unlink()
    train(cohort, tmp_path / "run", "threads=2")
    assert "started with threads=1, goes on with 2" in caplog.text
    assert "set threads=1 for the same" in caplog.text
