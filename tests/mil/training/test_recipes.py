"""Recipes and options of the MIL models, in the training and in the benchmark."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from mil.benchmark import Config as BenchmarkConfig
from mil.benchmark import main as benchmark_main
from mil.benchmark import make_settings
from mil.datasets.bags import Sample
from mil.models import MODELS, build, check_options
from mil.train import Config, main
from mil.training.engine import train_one_epoch
from mil.training.epochs import epoch_order
from mil.training.recipes import PUBLISHED, Recipe, recipe_factor, resolve
from patch_encoder.bags.bag import make_bag
from tests.mil.models.small_options import SMALL
from wsi_common.cli import run as run_script
from wsi_common.config import given_keys, load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError

CPU = World(0, 1, torch.device("cpu"))


def arguments(cohort: Path, output: Path, name: str, *more: str) -> list[str]:
    options = f"options={json.dumps(SMALL[name])}"
    folders = [
        f"labels={cohort}/labels.csv",
        f"features={cohort}/bags",
        f"output={output}",
        f"model={name}",
        options,
    ]
    return [*folders, "device=cpu", "folds=2", *more]


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_keys_are_keys_of_the_recipe(name: str):
    assert name in MODELS and set(PUBLISHED[name].training) <= {
        field.name for field in fields(Recipe)
    }


# differences from TS2G-KD's recipe, whose dropout is 0.25
TWENTY = {
    "epochs": 200,
    "patience": 20,
    "min_epochs": 70,
    "optimizer": "adam",
    "lr": 2e-4,
    "weight_decay": 1e-5,
}
TWENTY |= {
    "beta1": 0.9,
    "beta2": 0.999,
    "schedule": "cosine",
    "lr_drop": 0,
    "lr_drop_factor": 0.2,
    "lr_min": 0.0,
    "clip_norm": 0.0,
    "accumulate": 1,
}
TWENTY |= {
    "max_tiles": 0,
    "smoothing": 0.0,
    "label_smoothing": 0.0,
    "focal": 0.0,
    "class_weights": False,
}
TWENTY |= {"balanced": False, "precision": "fp32"}
NEVER = {"patience": 200, "min_epochs": 200}
TRANSMIL = {
    "optimizer": "lookahead_radam",
    "schedule": "constant",
    "accumulate": 2,
    "patience": 10,
    "min_epochs": 0,
}
DSMIL = {"weight_decay": 5e-3, "beta1": 0.5, "beta2": 0.9, "lr_min": 5e-6, "patience": 200}
CLAM = {"schedule": "constant", "min_epochs": 50, "balanced": True}
DTFD = {"lr": 1e-4, "weight_decay": 1e-4, "schedule": "step", "clip_norm": 5.0, **NEVER}
ILRA = {"lr": 1e-4, "weight_decay": 0.0, "epochs": 100, "patience": 100, "min_epochs": 100}
HIPT = {"epochs": 20, "patience": 20, "min_epochs": 20, "schedule": "constant", "balanced": True}
LONG = {"patience": 30, "min_epochs": 130}
RECIPES = {
    **dict.fromkeys(("mean", "max", "abmil", "gated_abmil", "multihead_abmil"), ({}, 0.25)),
    **dict.fromkeys(
        ("minet_instance", "minet_embedding", "minet_deep", "minet_residual"), ({}, 0.5)
    ),
    **dict.fromkeys(("rrt", "mhim_abmil", "mhim_dsmil", "mhim_transmil"), (LONG, 0.25)),
    **dict.fromkeys(("clam_sb", "clam_mb"), (CLAM, 0.25)),
    "dsmil": (DSMIL, 0.0),
    "transmil": (TRANSMIL, 0.0),
    "dtfd": (DTFD, 0.0),
    "ilra": (ILRA, 0.0),
    "deform_mil": ({}, 0.25),
    "hipt": (HIPT, 0.25),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_published_recipes(name: str):
    """Every key of every model: of the authors' code, see mil/training/recipes.py."""
    recipe, dropout = resolve(name, Recipe(), 0.25, ())
    differences, expected = RECIPES[name]
    found = {key: value for key, value in asdict(recipe).items() if key != "save_every"}
    assert found == TWENTY | differences and dropout == expected


def test_what_is_given_goes_before_what_is_published(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text("training: {weight_decay: 1.0e-5}\n")
    paths = [f"labels={tmp_path}", f"features={tmp_path}", f"output={tmp_path}"]
    config = load_config(
        Config, ["--config", str(file), *paths, "model=dtfd", "training.lr=2e-4", "dropout=0.25"]
    )
    # lr and dropout are given, though they are the defaults of the configuration
    recipe, dropout = resolve("dtfd", config.training, config.dropout, given_keys(config))
    assert (recipe.lr, recipe.weight_decay, recipe.schedule, dropout) == (2e-4, 1e-5, "step", 0.25)
    coded = Config(labels="x", features="x", output="x", training=Recipe(lr=3e-3))
    assert given_keys(coded) == {"labels", "features", "output", "training.lr"}
    recipe, _ = resolve("dtfd", Recipe(), 0.25, (), {"lr": 1, "dropout": 0.1, "schedule": "cosine"})
    assert (recipe.lr, recipe.schedule) == (1.0, "cosine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrr": 1.0}, "recipes: dtfd: unknown name 'lrr'; did you mean 'lr'"),
        ({"epochs": 1.5}, "recipes: dtfd: epochs: expected int, found 1.5"),
        ({"lr": "much"}, "recipes: dtfd: lr: expected float, found 'much'"),
        ({"schedule": "cosinus"}, "schedule: unknown value 'cosinus'; did you mean 'cosine'"),
    ],
)
def test_bad_changes_are_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        resolve("dtfd", Recipe(), 0.25, (), changes)


def test_options_are_checked_by_name_and_type():
    with pytest.raises(
        UserError, match="options of dtfd: unknown name 'distill'; did you mean 'distil'"
    ):
        check_options("dtfd", {"distill": "afs"})
    with pytest.raises(UserError, match="options of transmil: heads: expected int, found 'four'"):
        build("transmil", 6, 2, heads="four")
    with pytest.raises(
        UserError, match="options of clam_mb: unknown name 'branches'"
    ):  # that is what makes it MB
        check_options("clam_mb", {"branches": False})
    with pytest.raises(UserError, match="unknown name 'dropout'"):  # a key of its own
        check_options("abmil", {"dropout": 0.5})
    assert check_options("mhim_transmil", {"low": 1, "ema": "1e-4"}) == {"low": 1.0, "ema": 1e-4}
    assert (
        build("mhim_transmil", 6, 2, low=0.5, hidden=16, heads=4).low == 0.5
    )  # a number of a partial can be changed
    with pytest.raises(UserError, match="activation=rely: did you mean 'relu'"):
        build("abmil", 6, 2, activation="rely")


def test_bad_option_ends_before_any_work(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = arguments(make_cohort(), tmp_path / "run", "abmil", "options={head: 4}")
    assert run_script(main, Config, config) == 2
    assert "did you mean 'heads'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_learning_rates_of_published_recipes() -> None:
    """DTFD-MIL: MultiStepLR half-way by 0.2; DSMIL: cosine to 5e-6 from 2e-4; CLAM: constant."""
    dtfd, dsmil, clam = (
        resolve(name, Recipe(), 0.25, ())[0] for name in ("dtfd", "dsmil", "clam_sb")
    )
    assert [recipe_factor(dtfd, epoch) for epoch in (0, 99, 100, 199)] == [1.0, 1.0, 0.2, 0.2]
    odd = replace(dtfd, epochs=5)
    assert [recipe_factor(odd, epoch) for epoch in range(5)] == [1.0, 1.0, 1.0, 0.2, 0.2]
    assert recipe_factor(dsmil, 0) == 1.0
    assert recipe_factor(dsmil, 100) == pytest.approx((1 + 0.025) / 2)
    assert recipe_factor(dsmil, 200) == 0.025
    assert {recipe_factor(clam, epoch) for epoch in (0, 100, 199)} == {1.0}


def bags(targets: list[int]) -> list[Sample]:
    return [Sample(str(i), make_bag(torch.randn(5, 6)), target) for i, target in enumerate(targets)]


def test_balanced_epochs_draw_every_class_equally_often():
    samples = bags([1] * 5 + [0] * 95)
    order = epoch_order(samples * 20, True, torch.Generator().manual_seed(0))
    share = sum((samples * 20)[i].target for i in order) / len(order)
    assert len(order) == 2000 and abs(share - 0.5) < 4 * math.sqrt(0.25 / 2000)
    plain = epoch_order(samples, False, torch.Generator().manual_seed(0))
    assert sorted(plain) == list(range(100))


def test_gradients_are_clipped():
    model = build("mean", 6, 2, dropout=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    train_one_epoch(
        model, bags([1]), torch.optim.SGD(model.parameters(), 1.0), Recipe(clip_norm=1e-3), CPU, [0]
    )
    moved = sum(
        (p.detach() - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)
    )
    assert float(moved) == pytest.approx(1e-6, rel=1e-2)


def test_engine_tells_a_model_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    model, heard = build("mhim_abmil", 6, 2, hidden=8, standardize=True), []
    monkeypatch.setattr(model.model, "after_step", heard.append)
    optimizer = torch.optim.SGD(model.model.student.parameters(), 0.1)
    for epoch in range(2):
        train_one_epoch(
            model, bags([0, 1, 1]), optimizer, Recipe(epochs=2, accumulate=2), CPU, [0, 1, 2], epoch
        )
    assert heard == [0.25, 0.5, 0.75, 1.0]


def test_benchmark_takes_options_and_recipes_of_single_models(make_cohort, tmp_path: Path):
    cohort = make_cohort()
    blocks = [
        "options={dtfd: {hidden: 8, distil: mas}}",
        "recipes={dtfd: {lr: 1e-3}, max: {epochs: 1}}",
    ]
    run = [
        "seeds=[1]",
        "folds=2",
        "training.epochs=2",
        "training.min_epochs=1",
        "device=cpu",
        "isolated=false",
        "resamples=20",
        *blocks,
    ]
    paths = [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags]",
        f"output={tmp_path}/out",
        "models=[max,dtfd]",
    ]
    config = load_config(BenchmarkConfig, [*paths, *run])
    settings = make_settings(config)
    assert (
        settings["dtfd"].options == {"hidden": 8, "distil": "mas"} and settings["max"].options == {}
    )
    assert (
        settings["dtfd"].training.lr,
        settings["dtfd"].training.epochs,
        settings["dtfd"].dropout,
    ) == (1e-3, 2, 0.0)
    assert (
        settings["max"].training.lr,
        settings["max"].training.epochs,
        settings["max"].dropout,
    ) == (2e-4, 1, 0.25)
    assert benchmark_main(config) == 0
    with (tmp_path / "out" / "results.csv").open() as stream:
        assert {(row["model"], row["epochs"]) for row in csv.DictReader(stream)} == {
            ("max", "1"),
            ("dtfd", "2"),
        }
    for bad, message in (
        ("options={dtfdd: {}}", "options: unknown model 'dtfdd'"),
        ("recipes={max: 3}", "recipes: max: expected"),
    ):
        with pytest.raises(UserError, match=message):
            make_settings(load_config(BenchmarkConfig, [*paths, bad]))


def test_models_may_leave_out_classifiers_that_a_configuration_has_options_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = ["labels=.", "features=[.]", f"output={tmp_path}", "options={clam_mb: {}}"]
    config = load_config(BenchmarkConfig, [*paths, "models=[max]", "recipes={dtfd: {epochs: 2}}"])
    with caplog.at_level("INFO"):
        assert list(make_settings(config)) == ["max"]
    assert "options of clam_mb are not used" in caplog.text
    assert "recipes of dtfd are not used" in caplog.text
