"""The conversion script: every format to every layout, counts by case and scanner, nothing lost."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from detection_kd.convert_points import WRITERS, Config, main
from detection_kd.mitosis_sets.keys import read_point_set
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS
from tests.detection_kd.mitosis_sets.miniatures import set_keys, write_document
from wsi_common.cli import run

BOXES = [(1, 1, (10, 20, 60, 70)), (1, 2, (100, 20, 150, 70)), (2, 1, (0, 0, 50, 50))]


@pytest.fixture
def annotations(tmp_path: Path) -> list[str]:
    """Keys of a MIDOG file with two annotated images of one case, and one without annotation."""
    file = write_document(tmp_path / "MIDOG.json", ("1.tiff", "2.tiff", "3.tiff"), BOXES)
    cases = tmp_path / "cases.csv"
    cases.write_text("file,case,scanner\n1.tiff,p,s1\n2.tiff,p,s1\n3.tiff,q,s2\n")
    return [f"data.annotations={file}", f"data.cases={cases}"]


@pytest.mark.parametrize("layout", WRITERS)
def test_a_set_is_converted_and_counted(
    layout: str, annotations: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    output = tmp_path / "out"
    assert run(main, Config, [*annotations, f"to={layout}", f"output={output}"]) == 0
    again = read_point_set(set_keys(output / WRITERS[layout][0], layout))
    assert [(field.field_id, field.case, field.scanner) for field in again.fields] == [
        ("1", "p", "s1"), ("2", "p", "s1"), ("3", "q", "s2"),
    ]  # fmt: skip
    assert [field.annotated for field in again.fields] == [True, True, False]
    assert (again.count(MITOSIS), again.count(LOOK_ALIKE)) == (2, 1)
    with (output / "counts.csv").open() as stream:
        rows = [list(row.values()) for row in csv.DictReader(stream)]
    assert rows == [["p", "s1", "2", "0", "2", "1"], ["q", "s2", "1", "1", "0", "0"]]
    assert (
        "s1: 2 fields of 1 cases, 0 not annotated, 2 mitotic figures, 1 look-alikes" in caplog.text
    )
    assert f"read it back with data.format={layout} data.images=." in caplog.text


def test_what_is_there_is_replaced_only_when_told(
    annotations: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*annotations, "to=geojson", f"output={tmp_path / 'out'}"]
    old = tmp_path / "out/points/old.geojson"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    assert run(main, Config, arguments) == 2
    assert "expected no file there, found one" in capsys.readouterr().err and old.exists()
    assert run(main, Config, [*arguments, "overwrite=true"]) == 0
    assert sorted(path.stem for path in old.parent.iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.annotations=nowhere.json"], "nowhere.json"),
        ([], "missing key 'data.annotations'"),
        (["data.format=pascal"], "data.format"),
        (["data.first_index=3"], "first_index=3: expected 0 or 1"),
    ],
)
def test_wrong_keys_are_one_line(
    arguments: list[str],
    message: str,
    annotations: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = annotations if arguments and "annotations" not in arguments[0] else []
    assert run(main, Config, [*given, *arguments, f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_real_midog_annotations_keep_all_points(
    real_data: Path, root: Path, tmp_path: Path
) -> None:
    source = real_data / "midogpp_annotations/MIDOG++.json"
    cases = root / "configs/uts/midogpp_cases.csv"
    arguments = [f"data.annotations={source}", f"data.cases={cases}", f"output={tmp_path}"]
    assert run(main, Config, arguments) == 0
    again = read_point_set(set_keys(tmp_path / "points.csv", "csv"))
    assert (again.count(MITOSIS), again.count(LOOK_ALIKE)) == (11_937, 14_349)
    assert sum(not field.annotated for field in again.fields) == 50
