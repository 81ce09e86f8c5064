"""The plan of an ablation: which variants a grid has, what they are called, what goes to which
stage, and what is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from studies.ablation import DEFAULT, Config, Study, expand, main
from tests.helpers import ROOT
from wsi_common.config import load_config, make_assignments
from wsi_common.errors import UserError

BASE = {"adapter": "mpa", "loss": "mse", "stages": [1], "unfreeze": 0, "rank.top_k": 50}
FACTORS = {
    "adapter": ["p", "mpa"],
    "loss": ["mse", {"extra.distance": 25.5}],
    "stages": [[0, 1]],
    "unfreeze": [{"unfreeze": 1, "cache": False}],
    "K": [{"rank.top_k": 10}],
}


def test_one_factor_at_a_time_around_the_default() -> None:
    variants = expand(BASE, FACTORS, "one")
    named = {variant.name: variant for variant in variants}
    assert list(named) == [
        DEFAULT,
        "adapter-p",
        "distance-25.5",
        "stages-0+1",
        "unfreeze-1",
        "rank.top_k-10",
    ]
    assert [variant.factor for variant in variants] == [
        DEFAULT,
        "adapter",
        "loss",
        "stages",
        "unfreeze",
        "K",
    ]
    assert named["distance-25.5"].settings == {**BASE, "extra.distance": 25.5}
    for name, ranking, distillation in (
        (DEFAULT, ["top_k=50"], ["adapter=mpa", "loss=mse", "stages=[1]", "unfreeze=0"]),
        ("rank.top_k-10", ["top_k=10"], ["adapter=mpa", "loss=mse", "stages=[1]", "unfreeze=0"]),
        (
            "unfreeze-1",
            ["top_k=50"],
            ["adapter=mpa", "loss=mse", "stages=[1]", "unfreeze=1", "cache=false"],
        ),
    ):
        assert make_assignments(named[name].of_stage(ranking=True)) == ranking
        assert make_assignments(named[name].of_stage(ranking=False)) == distillation


def test_the_full_grid_has_every_combination_once() -> None:
    factors = {
        "adapter": ["p", "mpa", "m"],
        "loss": ["mse", "mae"],
        "K": [{"rank.top_k": 10}, {"rank.top_k": 50}],
    }
    variants = expand(BASE, factors, "full")
    combinations = {
        tuple(variant.settings[key] for key in ("adapter", "loss", "rank.top_k"))
        for variant in variants
    }
    assert len(variants) == len(combinations) == 12 and variants[0].name == DEFAULT
    both = next(
        variant for variant in variants if variant.name == "adapter-p_loss-mae_rank.top_k-10"
    )
    assert both.factor == "adapter+loss+K"


def test_what_cannot_be_a_grid_is_refused() -> None:
    with pytest.raises(UserError, match="adapter: expected a list of values, found 'p'"):
        expand(BASE, {"adapter": "p"}, "one")
    with pytest.raises(
        UserError, match="adaptor: expected its default value in default:, did you mean 'adapter'"
    ):
        expand(BASE, {"adaptor": ["p"]}, "one")
    with pytest.raises(UserError, match="expected a plain file name"):
        expand(BASE, {"adapter": ["../p"]}, "one")


@pytest.mark.parametrize("name", ["quickstart", "bccd"])
def test_the_lists_that_come_with_it_have_every_switch(name: str) -> None:
    content = yaml.safe_load((ROOT / "configs" / "ablation" / f"{name}.yaml").read_text())
    variants = {variant.name for variant in expand(content["default"], content["factors"], "one")}
    adapters = {f"adapter-{kind}" for kind in ("p", "m", "ma", "mp", "ln")}
    losses = {
        "loss-mae",
        "loss-cosine",
        "loss-smooth_l1",
        "distance-500",
        "angle-1000",
        "contrastive-20",
    }
    stages = {
        "stages-0",
        "stages-2",
        "stages-0+1",
        "stages-0+1+2",
        "pooling-gem",
        "pooling-attention",
        "unfreeze-1",
    }
    assert adapters | losses | stages | {DEFAULT, "ema-0.99", "rank.top_k-10"} <= variants


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The places that a quickstart has, empty."""
    for folder in (
        "cohort/slides",
        "tiles",
        "features/stain_texture",
        "features/mean_colour",
        "detector",
    ):
        (tmp_path / "base" / folder).mkdir(parents=True)
    for file in ("cohort/labels.csv", "detector/backbone.pt"):
        (tmp_path / "base" / file).touch()
    return tmp_path / "base"


def configured(base: Path, *arguments: str) -> Config:
    recipes = [
        f"{name}_config={ROOT}/configs/quickstart/{name}.yaml" for name in ("rank", "d2vfm", "mil")
    ]
    grid = [f"default={json.dumps(BASE)}", "factors={adapter: [p, m]}"]
    return load_config(
        Config, [f"base={base}", f"output={base.parent}/study", *recipes, *grid, *arguments]
    )


def test_a_variant_that_fails_is_listed_and_the_others_go_on(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, list[str]] = {}

    def stage(self: Study, name: str, module: str, arguments: list[str]) -> str:
        calls[name] = list(arguments)
        return "key 'adapter': expected another" if name == "train adapter-p" else ""

    monkeypatch.setattr(Study, "stage", stage)
    assert main(configured(base)) == 1
    study = base.parent / "study"
    expected = "variant,stage,error\nadapter-p,train_d2vfm,key 'adapter': expected another\n"
    assert (study / "failures.csv").read_text() == expected
    order = [
        "rank top_k-50",
        "train default",
        "train adapter-p",
        "train adapter-m",
        "student features",
        "encoder cost",
    ]
    assert list(calls) == [*order, "mil benchmark", "table"], "one ranking for all"
    assert (
        "adapter=m" in calls["train adapter-m"]
        and f"dataset={study}/distillation/top_k-50" in calls["train adapter-m"]
    )
    listed = next(word for word in calls["mil benchmark"] if word.startswith("features="))
    folders = [word.rsplit("/", 1)[1] for word in listed.strip("[]").split(",")]
    assert folders == [DEFAULT, "adapter-m", "stain_texture", "mean_colour"], (
        "the default is what others are compared with"
    )
    monkeypatch.setattr(Study, "stage", lambda *_: "")
    assert main(configured(base)) == 0
    assert not (study / "failures.csv").exists(), "mended, and no longer listed"


def test_where_nothing_is_left_it_says_so(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Study, "stage", lambda self, name, *_: "the disk is full" if name.startswith("rank") else ""
    )
    with pytest.raises(UserError, match="all 3 variants failed, the first with: the disk is full"):
        main(configured(base))
    monkeypatch.setattr(
        Study, "stage", lambda self, name, *_: "no room" if name == "mil benchmark" else ""
    )
    with pytest.raises(UserError, match="mil benchmark: no room"):
        main(configured(base))


def test_inputs_that_are_missing_are_named_before_any_work(base: Path) -> None:
    (base / "detector" / "backbone.pt").unlink()
    with pytest.raises(
        UserError,
        match="expected the backbone of a cohort, found nothing; run tools/quickstart.sh first",
    ):
        main(configured(base))
    (base / "detector" / "backbone.pt").touch()
    with pytest.raises(UserError, match="features/plip: expected feature bags, found none"):
        main(configured(base, "teacher=plip"))
    with pytest.raises(UserError, match="missing key 'slides'"):
        main(configured(base, "base="))
    assert not (base.parent / "study").exists()


def test_a_stage_leaves_its_log_its_time_and_its_error(tmp_path: Path) -> None:
    study = Study(tmp_path, {}, [])
    assert study.stage("help", "studies.ablation", ["--help"]) == ""
    assert "combinations" in (tmp_path / "logs" / "help.log").read_text()
    error = study.stage("wrong one", "studies.ablation", ["combination=full", "output=x"])
    assert error == "command line: unknown key 'combination'; did you mean 'combinations'?"
    notes = {
        stage["name"]: stage["seconds"]
        for stage in json.loads((tmp_path / "stages.json").read_text())["stages"]
    }
    assert notes["help"] > 0 and notes["wrong one"] is None
