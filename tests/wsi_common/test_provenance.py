"""What is on disk is reused, made or refused, by what it was made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsi_common.errors import UserError
from wsi_common.provenance import can_reuse, differences, unknown_origin

MADE_WITH = {"lr": 0.1, "sizes": [2, 3], "model": {"name": "abmil", "hidden": None}}


def unread() -> dict[str, object]:
    pytest.fail("the record was read")


def test_nothing_there_and_overwriting_mean_make_without_reading_the_record(tmp_path: Path) -> None:
    assert not can_reuse(tmp_path / "absent", unread, MADE_WITH, "another run")
    assert not can_reuse(tmp_path, unread, MADE_WITH, "another run", overwrite=True)


def test_the_same_record_is_reused_however_it_was_stored(tmp_path: Path) -> None:
    stored = {**MADE_WITH, "lr": np.float64(0.1), "sizes": np.array([2, 3])}
    assert can_reuse(tmp_path, lambda: stored, {**MADE_WITH, "sizes": (2, 3)}, "another run")


def test_another_record_is_refused_in_one_line_that_names_both_and_the_remedy(
    tmp_path: Path,
) -> None:
    wanted = {"lr": 0.2, "model": {"name": "abmil", "hidden": 8}, "seed": None}
    with pytest.raises(UserError) as error:
        can_reuse(tmp_path, lambda: MADE_WITH, wanted, "another run")
    assert str(error.value) == (
        f"{tmp_path}: holds another run: lr 0.1 -> 0.2, model.hidden None -> 8, seed nothing -> "
        "None, sizes [2, 3] -> nothing; choose another output or set overwrite=true"
    )


@pytest.mark.parametrize("found", [{}, {"a": None}, {"a": {}}, {"a": {"b": 1}}])
def test_records_that_differ_never_look_the_same(found: dict[str, object]) -> None:
    for wanted in ({}, {"a": None}, {"a": {}}, {"a": {"b": 1}}):
        assert bool(differences(found, wanted)) == (found != wanted)


def test_long_differences_are_cut_and_counted() -> None:
    found = {str(i): i for i in range(6)}
    assert differences(found, {}, limit=2) == "0 0 -> nothing, 1 1 -> nothing and 4 more"


def test_unknown_origin_names_what_is_missing() -> None:
    error = unknown_origin("runs/a", "checkpoints", "run.json")
    assert "holds checkpoints without run.json" in str(error) and "another output" in str(error)
