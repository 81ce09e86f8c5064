"""The strict merge: defaults < YAML < command line, and one-line errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config import (
    REQUIRED,
    ConfigError,
    HelpRequested,
    given_keys,
    group,
    identity,
    key,
    load_config,
    to_dict,
)


@dataclass
class Optimiser:
    lr: float = key(1e-4, "learning rate")
    steps: list[int] = key([1, 2], "steps")


@dataclass
class Config:
    data: str = key(REQUIRED, "input folder", path=True)
    model: str = key("abmil", "model", choices=("abmil", "mean"))
    epochs: int = key(3, "epochs")
    target: float | None = key(None, "target in um per pixel")
    slide_id: str | None = key(None, "an id")
    fast: bool = key(False, "speed only", runtime=True)
    optimiser: Optimiser = group(Optimiser, "optimiser")


def load(*arguments: str, check_paths: bool = False) -> Config:
    return load_config(Config, arguments, check_paths=check_paths)


def test_command_line_wins_over_yaml_wins_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 5\ndata: x\noptimiser:\n  lr: 1e-3\n")
    config = load("--config", str(file), "epochs=7")
    assert (config.epochs, config.optimiser.lr, config.optimiser.steps, config.model) == (
        7,
        1e-3,
        [1, 2],
        "abmil",
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data=x", "epoch=3"], "unknown key 'epoch'; did you mean 'epochs'?"),
        (["data=x", "optimiser.rl=3"], "did you mean 'optimiser.lr'?"),
        (["data=x", "epochs=three"], "key 'epochs': expected int, found 'three'"),
        (["data=x", "epochs=1.5"], "expected int"),
        (["data=x", "optimiser.lr=fast"], "expected float"),
        (["data=x", "model=abmill"], "did you mean 'abmil'?"),
        ([], "missing key 'data'"),
        (["data=x", "--verbose"], "expected --config FILE, --help or key=value"),
        (["--config"], "found nothing after it"),
        (["--config", "no/such/file.yaml"], "expected a YAML file, found none"),
    ],
)
def test_errors_are_one_line_with_the_remedy(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "epoch: 3\n", "optimiser: 3\n"])
def test_yaml_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load("--config", str(tmp_path / "c.yaml"), "data=x")


def test_missing_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    with pytest.raises(ConfigError, match="did you mean 'slides'"):
        load(f"data={tmp_path}/slide", check_paths=True)
    assert load(f"data={tmp_path}/slides", check_paths=True).data.endswith("slides")


def test_text_keeps_its_zeros_and_null_is_none() -> None:
    config = load("data=x", "slide_id=0012", "target=0.5")
    assert (config.slide_id, config.target) == ("0012", 0.5)
    config = load("data=x", "slide_id=null", "target=null", "optimiser.steps=[3]", "fast=true")
    assert (config.slide_id, config.target, config.optimiser.steps, config.fast) == (
        None,
        None,
        [3],
        True,
    )


def test_help_lists_every_key_with_type_default_and_meaning() -> None:
    with pytest.raises(HelpRequested) as request:
        load("--help")
    text = str(request.value)
    for name in (
        "data",
        "model",
        "epochs",
        "target",
        "slide_id",
        "fast",
        "optimiser.lr",
        "optimiser.steps",
    ):
        assert f"  {name} (" in text
    assert "required" in text
    assert "abmil | mean" in text
    assert "(int = 3)" in text


def test_identity_leaves_out_speed_and_paths() -> None:
    config = load("data=x", "fast=true")
    assert set(identity(config)) == {
        "model",
        "epochs",
        "target",
        "slide_id",
        "optimiser.lr",
        "optimiser.steps",
    }
    assert to_dict(config)["optimiser"] == {"lr": 1e-4, "steps": [1, 2]}


@dataclass
class Listed:
    """Keys with a list and a second name."""

    stages: list[int] = key([1], "stages", alias="needle")
    files: list[str] = key([], "files")


def test_a_list_takes_a_plain_value_and_a_key_its_second_name(tmp_path: Path) -> None:
    config = load_config(Listed, ["needle=2", "files=a b.pt"])
    assert (config.stages, config.files) == ([2], ["a b.pt"])
    file = tmp_path / "c.yaml"
    file.write_text("needle: [0, 1]\nfiles: [a, b]\n")
    config = load_config(Listed, ["--config", str(file)])
    assert (config.stages, config.files) == ([0, 1], ["a", "b"])
    assert given_keys(config) == {"stages", "files"}
