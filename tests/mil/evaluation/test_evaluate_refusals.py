"""What the evaluation script refuses, in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mil.evaluation.prediction_tables import evaluate, read, rows_of, table, write


def change(index: int, **values: object):
    def apply(rows: list[dict[str, str]]) -> None:
        rows[index].update({name: str(value) for name, value in values.items()})

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change(3, prob_p="x"), "slide s3: expected a finite number in prob_p, found 'x'"),
        (change(3, prob_p="nan"), "slide s3: expected a finite number in prob_p, found 'nan'"),
        (change(3, prob_p="1.5"), "expected probabilities from 0 to 1, found"),
        (
            change(3, prob_p="0.5", prob_n="0.1"),
            "slide s3: expected probabilities that sum to 1, found 0.6",
        ),
        (change(3, label="q"), "slide s3: label 'q' has no column prob_q"),
        (change(3, split="train"), "slide s3: expected split val or test, found 'train'"),
        (change(3, fold="one"), "slide s3: expected a whole number in fold, found 'one'"),
        (change(3, case_id=" "), "said.csv, line 5: expected a case_id, found none"),
        (change(4, slide_id="s5"), "expected every .* slide once, found twice: s5"),
        (change(0, case_id="c5", split="test"), "1 cases are in val and in test: c5"),
    ],
)
def test_faulty_tables_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], apply, message: str
):
    path = table(tmp_path / "said.csv")
    rows = read(path)
    apply(rows)
    write(path, rows)
    assert evaluate(f"predictions=[{path}]", f"output={tmp_path}/out") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either benchmark=<folder> or predictions="),
        (["predictions=[{path}]"], "missing key 'output'"),
        (
            ["predictions=[{path}]", "output={out}", "task=cox"],
            "expected the columns time, event, risk, found no time",
        ),
        (
            ["predictions=[{path}]", "output={out}", "positive=x"],
            "positive=x: expected one of the classes n, p",
        ),
        (["predictions=[{path}]", "output={out}", "target=0"], "target=0.0: expected a rate"),
        (["benchmark={out}"], "no such|does not exist|found none|expected"),
    ],
)
def test_faulty_keys_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    path = table(tmp_path / "said.csv")
    given = [argument.format(path=path, out=tmp_path / "out") for argument in arguments]
    assert evaluate(*given) == 2
    assert re.search(message, capsys.readouterr().err)


def test_names_do_not_leave_the_folder_and_columns_have_to_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{**row, "feature_set": "../up"} for row in read(table(tmp_path / "said.csv"))]
    assert (
        evaluate(f"predictions=[{write(tmp_path / 'up.csv', rows)}]", f"output={tmp_path}/out") == 2
    )
    assert "feature set '../up': expected a plain file name" in capsys.readouterr().err
    for kind in ("classes", "multilabel", "ordinal"):
        given = [f"task={kind}"] if kind else []
        path = write(tmp_path / "cox.csv", rows_of("cox"))
        assert evaluate(f"predictions=[{path}]", f"output={tmp_path}/out", *given) == 2
        assert "columns prob_<class> or more, found 0" in capsys.readouterr().err
