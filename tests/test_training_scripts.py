"""Every training script learns, resumes bit for bit after a SIGKILL, leaves a finished run alone,
writes its weights as safetensors, and trains on two processes as on one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.training_harness import (
    Row,
    assert_learned,
    assert_left_alone,
    assert_pair_is_one,
    assert_resumes,
    assert_shared,
    start,
)
from tests.training_rows import ROWS

# no test here looks at a figure
pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_rendering")]


def names(row: Row) -> str:
    """The row's name as the test's id."""
    return row.name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], list[str]]:
    """The arguments that name a row's inputs; rows with the same inputs share them."""
    made: dict[object, list[str]] = {}

    def make(row: Row) -> list[str]:
        if row.inputs not in made:
            made[row.inputs] = row.inputs(tmp_path_factory.mktemp("inputs"))
        return made[row.inputs]

    return make


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, inputs: Callable[[Row], list[str]]
) -> Callable[[Row], Path]:
    """The directory of a row's uninterrupted run."""
    made: dict[str, Path] = {}

    def make(row: Row) -> Path:
        if row.name not in made:
            output = tmp_path_factory.mktemp("finished") / "run"
            assert start(row, [*inputs(row), *row.settings, f"output={output}"]) == 0
            made[row.name] = output
        return made[row.name]

    return make


@pytest.mark.parametrize("row", [row for row in ROWS if row.learns], ids=names)
def test_it_learns(row: Row, finished: Callable[[Row], Path]) -> None:
    assert row.learns is not None
    assert_learned(finished(row), *row.learns)


@pytest.mark.parametrize("row", [row for row in ROWS if row.resumes], ids=names)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    row: Row,
    finished: Callable[[Row], Path],
    inputs: Callable[[Row], list[str]],
    tmp_path: Path,
) -> None:
    assert_resumes(row, [*inputs(row), *row.settings], finished(row), tmp_path / "killed")


@pytest.mark.parametrize("row", [row for row in ROWS if row.learns], ids=names)
def test_a_finished_run_is_left_alone(
    row: Row, finished: Callable[[Row], Path], inputs: Callable[[Row], list[str]]
) -> None:
    assert_left_alone(row, [*inputs(row), *row.settings], finished(row))


@pytest.mark.parametrize("row", [row for row in ROWS if row.learns], ids=names)
def test_a_finished_run_has_its_weights_as_safetensors(
    row: Row, finished: Callable[[Row], Path]
) -> None:
    assert_shared(finished(row))


@pytest.mark.parametrize("row", [row for row in ROWS if row.pair], ids=names)
def test_two_processes_train_as_one(
    row: Row, inputs: Callable[[Row], list[str]], tmp_path: Path
) -> None:
    assert_pair_is_one(row, inputs(row), tmp_path)


def test_every_training_script_has_its_rows() -> None:
    """Each of them learns, resumes and trains in pairs in some row."""
    paths = [path.relative_to(ROOT) for path in ROOT.glob("*/train*.py")]
    scripts = {".".join(path.with_suffix("").parts) for path in paths if path.parts[0] != "tests"}
    # trains a few layers fold by fold in one process: tests/detection_kd/test_train_atypical.py
    scripts -= {"detection_kd.train_atypical"}
    assert scripts >= {"detection_kd.train_detector", "detection_kd.train_d2vfm", "mil.train"}
    for script in scripts:
        rows = [row for row in ROWS if row.script == script]
        assert any(row.learns for row in rows), f"{script} has no row that learns"
        assert any(row.resumes for row in rows), f"{script} has no row that resumes"
        assert any(row.pair for row in rows), f"{script} has no row of two processes"
