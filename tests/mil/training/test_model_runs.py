"""Every model through mil.train: a whole run directory, and the same one when it was killed after
its first epoch.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import mil.training.engine as engine
from mil.models import MODELS
from mil.train import Config, main
from patch_encoder.bags.bag import open_bag
from tests.mil.models.small_options import SMALL
from wsi_common.config import load_config
from wsi_common.distributed import unwrap

FILES = {
    "config.yaml",
    "metrics.jsonl",
    "checkpoint_last.pt",
    "checkpoint_best.pt",
    "results.json",
    "environment.json",
}


def train(cohort: Path, output: Path, name: str) -> dict:
    recipe = ["epochs=2", "min_epochs=2", "save_every=1", "accumulate=4", "lr=1e-3"]
    options = ",".join(f"{key}: {value}" for key, value in SMALL[name].items())
    more = [f"model={name}", f"options={{{options}}}", "standardize=true", "device=cpu", "folds=2"]
    paths = [f"labels={cohort}/labels.csv", f"features={cohort}/bags", f"output={output}"]
    assert (
        main(load_config(Config, [*paths, *more, *(f"training.{key}" for key in recipe)])) is None
    )
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("name", list(MODELS))
def test_a_run_directory_and_its_resumption(
    make_cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    cohort = make_cohort(slides=16)
    whole = train(cohort, tmp_path / "whole", name)
    assert whole["epochs"] == 2 and whole["best_epoch"] in (1, 2)
    assert FILES | {"predictions.csv"} <= {path.name for path in (tmp_path / "whole").iterdir()}
    original, died = engine.train_one_epoch, []

    def dies_in_its_second_epoch(model, *rest):
        kind, epoch = type(unwrap(model).model), rest[5]
        if epoch == 1 and kind not in died:
            died.append(kind)
            raise KeyboardInterrupt
        return original(model, *rest)

    monkeypatch.setattr(engine, "train_one_epoch", dies_in_its_second_epoch)
    for _ in range(2 if name.startswith("mhim") else 1):  # the plain model is killed too
        with pytest.raises(KeyboardInterrupt):
            train(cohort, tmp_path / "parts", name)
    assert train(cohort, tmp_path / "parts", name) == whole
    for file in ("predictions.csv", "metrics.jsonl"):
        assert (tmp_path / "whole" / file).read_text() == (tmp_path / "parts" / file).read_text()
    first, second = (
        torch.load(tmp_path / run / "checkpoint_last.pt", weights_only=True)
        for run in ("whole", "parts")
    )
    assert (
        first["epoch"] == second["epoch"] == 2 and first["model"].keys() == second["model"].keys()
    )
    assert all(torch.equal(tensor, second["model"][key]) for key, tensor in first["model"].items())
    # the best weights alone say what predictions.csv says
    model, _ = engine.load_trained_model(
        tmp_path / "whole" / "checkpoint_best.pt", torch.device("cpu")
    )
    with (tmp_path / "whole" / "predictions.csv").open() as stream:
        row = next(row for row in csv.DictReader(stream) if row["split"] == "test")
    bag = open_bag(cohort / "bags" / "h5_files" / f"{row['slide_id']}.h5")
    with torch.inference_mode():
        probability = model(bag.read().float(), bag.coords).logits.softmax(0)[1]
    assert float(probability) == pytest.approx(float(row["prob_pos"]), abs=1e-5)
