"""The strict merge: defaults < YAML < command line, and one-line errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from wsi_common.config import (
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


@dataclass
class Texts:
    slide_id: str | None = key(None, "an id")
    name: str = key("a", "a name", alias="title")
    only: list[str] = key([], "ids")
    weights: dict[str, Any] = key({}, "weights by name")
    lr: float = key(0.1, "learning rate")
    scales: list[float] = key([1.0], "scales")
    optimiser: Optimiser = group(Optimiser, "optimiser")


@pytest.mark.parametrize("text", ["0012", "1_000", "12:30", "yes", "1.50", "2024-01-02", "0x1f"])
def test_text_keys_keep_the_text_of_the_file_and_of_the_command_line(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"slide_id: {text}\nname: {text}\nonly: [{text}, {text}]\n")
    expected = (text, text, [text, text])
    config = load_config(Texts, ["--config", str(file)])
    assert (config.slide_id, config.name, config.only) == expected
    config = load_config(Texts, [f"slide_id={text}", f"title={text}", f"only=[{text},{text}]"])
    assert (config.slide_id, config.name, config.only) == expected
    assert load_config(Texts, [f"only={text}"]).only == [text]
    file.write_text("slide_id: null\nlr: 1e-3\n")
    assert load_config(Texts, ["--config", str(file)]).slide_id is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("lr: 1\nlr: 2\n", "'lr' twice"),
        ("optimiser:\n  lr: 1\n  lr: 2\n", "'lr' twice"),
        ("optimiser:\n  lr: 1\noptimiser.lr: 2\n", "'optimiser.lr'.*twice"),
        ("name: a\ntitle: b\n", "'name'.*twice"),
        ("weights: {a: 1, a: 2}\n", "'a' twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml: .*{found}") as caught:
        load_config(Texts, ["--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(caught.value)


def test_anchors_and_merged_mappings_are_no_repetition(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("weights: &base {a: 1, b: 2}\noptimiser: {steps: [3]}\n")
    assert load_config(Texts, ["--config", str(file)]).weights == {"a": 1, "b": 2}
    file.write_text("weights: {<<: {a: 1, b: 2}, b: 3}\n")
    assert load_config(Texts, ["--config", str(file)]).weights == {"a": 1, "b": 3}


def test_a_second_configuration_file_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("lr: 1\n")
    with pytest.raises(ConfigError, match=r"a\.yaml and .*b\.yaml"):
        load_config(Texts, ["--config", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml"])


@pytest.mark.parametrize("argument", ["name=${HOME}", "only=[a,'${x}']", "weights={a: '${b}'}"])
def test_variables_are_refused_in_one_line(tmp_path: Path, argument: str) -> None:
    with pytest.raises(ConfigError, match=r"\$\{"):
        load_config(Texts, [argument])
    (tmp_path / "c.yaml").write_text(argument.replace("=", ": ", 1).replace(": ${HOME}", ": '${'"))
    with pytest.raises(ConfigError, match=r"\$\{"):
        load_config(Texts, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("argument", ["lr=nan", "optimiser.lr=.nan", "scales=[1.0,.nan]"])
def test_nan_is_no_setting(argument: str) -> None:
    with pytest.raises(ConfigError, match="found nan"):
        load_config(Texts, [argument])


def test_a_number_below_the_least_is_refused() -> None:
    @dataclass
    class Limited:
        every: int | None = key(1, "steps", least=1)
        shares: list[float] = key([], "shares", least=0)

    assert load_config(Limited, ["every=null", "shares=[0,2]"]).shares == [0.0, 2.0]
    with pytest.raises(ConfigError, match="key 'every': expected at least 1, found 0"):
        load_config(Limited, ["every=0"])
    with pytest.raises(ConfigError, match="key 'shares': expected at least 0, found -0.5"):
        load_config(Limited, ["shares=[1,-0.5]"])
