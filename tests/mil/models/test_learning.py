"""Every MIL model learns under its own recipe; teacher and slow weights resume bit for bit; the
teacher's start.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mil.training.engine as engine
from mil.datasets.bags import Sample
from mil.models import MODELS, build
from mil.train import Config, build_job, main
from mil.training.engine import train_one_epoch
from mil.training.epochs import epoch_order
from mil.training.fold_run import PLAIN
from mil.training.prediction import predict
from mil.training.recipes import Recipe, resolve
from patch_encoder.bags.bag import make_bag
from tests.mil.models.small_options import SMALL
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.metrics.classification import auc
from wsi_common.optim import make_optimizer, trainable


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


def problem(count: int, seed: int, signs: int) -> list[Sample]:
    """Bags of 12 tiles; `signs` of a positive bag's are of another kind."""
    generator, samples = torch.Generator().manual_seed(seed), []
    places = torch.tensor([(64 * x, 64 * y) for y in range(3) for x in range(4)])
    for i in range(count):
        tiles = torch.randn(12, 8, generator=generator)
        tiles[:signs, 0] += 5.0 * (i % 2)
        samples.append(
            Sample(str(i), make_bag(tiles[torch.randperm(12, generator=generator)], places), i % 2)
        )
    return samples


# (model, tiles that show it, epochs): a transformer needs more than 24 bags to find a quarter of
# the tiles
LEARNERS = [
    (name, 3, 6) for name in MODELS if name not in ("transmil", "mhim_transmil", "hipt")
] + [
    ("hipt", 8, 6),
    ("transmil", 8, 4),
    ("mhim_transmil", 8, 4),
]
SECONDS = ("transmil", "mhim_transmil", "ilra", "rrt", "deform_mil")  # that their training takes


@pytest.mark.parametrize(
    ("name", "signs", "epochs"),
    [
        pytest.param(*learner, marks=[pytest.mark.process] * (learner[0] in SECONDS))
        for learner in LEARNERS
    ],
)
def test_every_model_learns(name: str, signs: int, epochs: int):
    """From 24 bags, under its published recipe with a higher learning rate, what it needs for 60
    others.
    """
    given = ("training.lr", "training.epochs", "training.accumulate")
    recipe, dropout = resolve(name, Recipe(lr=1e-2, epochs=epochs), 0.25, given)
    torch.manual_seed(0)
    model = build(name, 8, 2, standardize=True, dropout=dropout, **SMALL[name])
    train, test = problem(24, 0, signs), problem(60, 1, signs)
    model.fit([sample.bag for sample in train])
    optimizer = make_optimizer(
        recipe.optimizer,
        trainable(model),
        recipe.lr,
        recipe.weight_decay,
        (recipe.beta1, recipe.beta2),
    )
    losses = []
    for epoch in range(epochs):
        order = epoch_order(train, recipe.balanced, torch.Generator().manual_seed(epoch))
        losses.append(
            train_one_epoch(
                model, train, optimizer, recipe, World(0, 1, torch.device("cpu")), order, epoch
            )
        )
    scores = predict(model, test, torch.device("cpu")).softmax(1).numpy()
    assert (
        losses[-1] < losses[0]
        and auc(np.array([sample.target for sample in test]), scores)[0] > 0.9
    )


@pytest.mark.process
@pytest.mark.parametrize("name", ["mhim_abmil", "transmil", "dtfd"])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    make_cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    more = (
        "training.epochs=4",
        "training.min_epochs=4",
        "training.save_every=2",
        "training.lr=1e-3",
        "dropout=0.25",
    )
    cohort = make_cohort(slides=12)
    main(load_config(Config, arguments(cohort, tmp_path / "whole", name, *more)))
    original, epochs = engine.train_one_epoch, 0
    last = 8 if name == "mhim_abmil" else 4  # the plain model comes first

    def dies_in_last_epoch(*given):
        nonlocal epochs
        epochs += 1
        if epochs == last:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(engine, "train_one_epoch", dies_in_last_epoch)
    with pytest.raises(KeyboardInterrupt):
        main(load_config(Config, arguments(cohort, tmp_path / "parts", name, *more)))
    main(load_config(Config, arguments(cohort, tmp_path / "parts", name, *more)))
    assert epochs == last + 2
    for file in ("results.json", "predictions.csv", "metrics.jsonl"):
        assert (tmp_path / "whole" / file).read_text() == (tmp_path / "parts" / file).read_text()
    whole, parts = (
        torch.load(tmp_path / run / "checkpoint_last.pt", weights_only=True)["model"]
        for run in ("whole", "parts")
    )
    assert all(torch.equal(w, parts[n]) for n, w in whole.items())
    assert name != "mhim_abmil" or float(whole["progress"]) == 1.0


def test_teacher_starts_from_the_plain_model_of_the_same_split(make_cohort, tmp_path: Path):
    more = (
        "training.epochs=2",
        "training.min_epochs=2",
        "options={hidden: 8, ema: 1.0, ema_final: 1.0}",
    )
    config = load_config(Config, arguments(make_cohort(), tmp_path / "run", "mhim_abmil", *more))
    main(config)
    plain = torch.load(tmp_path / "run" / PLAIN / "checkpoint_best.pt", weights_only=True)
    best = torch.load(tmp_path / "run" / "checkpoint_best.pt", weights_only=True)["model"]
    assert (
        plain["config"]["network"]["name"] == "abmil" and plain["config"]["network"]["hidden"] == 8
    )
    for name, tensor in plain["model"].items():
        assert torch.equal(
            best[f"teacher.{name}"], tensor
        )  # a decay of 1 leaves the teacher where it started
    job = build_job(config)
    with (tmp_path / "run" / PLAIN / "predictions.csv").open() as stream:
        assert {row["slide_id"] for row in csv.DictReader(stream)} == {
            *job.split.val,
            *job.split.test,
        }
