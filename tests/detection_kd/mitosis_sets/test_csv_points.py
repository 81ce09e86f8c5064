"""Points in plain tables: what the columns mean, what is refused, cases and images beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detection_kd.mitosis_sets.csv_points import write_csv_points
from detection_kd.mitosis_sets.keys import read_point_set
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS
from tests.detection_kd.mitosis_sets.miniatures import set_keys, write_image
from wsi_common.errors import UserError

TABLE = """file,x,y,class
b/2.tiff,10.5,20,Mitotic figure
b/2.tiff,30,40,Non-mitotic cell
a.tiff,,,
"""


def write_table(path: Path, text: str = TABLE) -> Path:
    path.write_text(text)
    return path


def test_rows_are_points_and_a_row_without_position_is_a_negative_field(tmp_path: Path) -> None:
    first, second = read_point_set(set_keys(write_table(tmp_path / "p.csv"), "csv")).fields
    assert (first.field_id, second.field_id, second.path) == ("a", "b_2", Path("b/2.tiff"))
    assert first.annotated and first.look_alikes and not len(first.points)
    np.testing.assert_array_equal(second.points, [[10.5, 20], [30, 40]])
    np.testing.assert_array_equal(second.labels, [MITOSIS, LOOK_ALIKE])


def test_points_without_class_are_mitoses(tmp_path: Path) -> None:
    table = write_table(tmp_path / "p.csv", "file,x,y\na.tiff,1,2\n")
    (field,) = read_point_set(set_keys(table, "csv")).fields
    assert field.labels.tolist() == [MITOSIS] and not field.look_alikes


def test_the_first_index_is_taken_off(tmp_path: Path) -> None:
    table = write_table(tmp_path / "p.csv", "file,x,y\na.tiff,1,2\n")
    (field,) = read_point_set(set_keys(table, "csv", first_index=1)).fields
    assert field.points.tolist() == [[0, 1]]
    with pytest.raises(UserError, match="first_index=2: expected 0 or 1"):
        read_point_set(set_keys(table, "csv", first_index=2))
    with pytest.raises(
        UserError, match="mpp: expected um per level-0 pixel, 0.05 to 10.0, found 25"
    ):
        read_point_set(set_keys(table, "csv", mpp=25.0))


def test_what_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    text = "file,field,case,scanner,mpp,annotated,x,y,class\n"
    text += "x/a.tiff,A,c1,s1,0.25,1,0.1,33.333333333333336,mitosis\n"
    text += "x/a.tiff,A,c1,s1,0.25,1,7,8,look-alike\nx/b.tiff,B,c1,,,0,,,\n"
    found = read_point_set(set_keys(write_table(tmp_path / "p.csv", text), "csv"))
    write_csv_points(tmp_path / "again.csv", found)
    again = read_point_set(set_keys(tmp_path / "again.csv", "csv", images=""))
    for old, new in zip(found.fields, again.fields, strict=True):
        assert (old.field_id, old.case, old.scanner, old.mpp) == (
            new.field_id, new.case, new.scanner, new.mpp,
        )  # fmt: skip
        assert (old.annotated, old.look_alikes) == (new.annotated, new.look_alikes)
        np.testing.assert_array_equal(old.points, new.points)
        np.testing.assert_array_equal(old.labels, new.labels)
    assert [field.annotated for field in again.fields] == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,x\na,1\n", "expected columns file,x,y; 'y' is missing"),
        ("file,x,y\na.tiff,1,two\n", "line 2: expected a number in y, found 'two'"),
        ("file,x,y\na.tiff,1,\n", "line 2: expected a number in y, found ''"),
        ("file,x,y\na.tiff,1,nan\n", "field a: expected finite positions"),
        ("file,x,y\n,1,2\n", "line 2: expected a file"),
        ("file,x,y,class\na.tiff,1,2,lymphocyte\n", "line 2: expected the class 'mitotic figure'"),
        ('file,x,y,class\na.tiff,1,2,"mit\nosis"\n', r"found 'mit\\nosis'; rename it"),
        ("file,x,y,case\na.tiff,1,2,p\na.tiff,3,4,q\n", "a.tiff: expected one case, found 'p' and"),
        ("file,x,y,annotated\na.tiff,1,2,0\n", "a.tiff: expected no points where annotated is 0"),
        ("file,x,y,annotated\na.tiff,1,2,maybe\n", "expected 1 or 0 in annotated, found 'maybe'"),
        ("file,x,y\na/b.tiff,1,2\na_b.png,1,2\n", "expected one field a_b, found a.b.tiff and"),
        ("file,x,y\n../b.tiff,1,2\n", "below images=, found '../b.tiff'"),
        ("file,x,y\n/b.tiff,1,2\n", "below images=, found '/b.tiff'"),
        ("file,x,y,field\nb.tiff,1,2,a/b\n", "field 'a/b': expected a plain file name"),
        ("file,x,y\na.tiff,,\n", "expected mitotic figures, found none in 1 fields"),
    ],
)
def test_what_is_wrong_in_a_table_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "p.csv", text)
    with pytest.raises(UserError, match=message) as caught:
        read_point_set(set_keys(table, "csv"))
    assert "\n" not in str(caught.value)


def test_images_give_their_resolution_and_have_to_hold_the_points(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.tiff", mpp=0.5)
    write_image(tmp_path / "images/b/2.tiff", mpp=None)
    table = write_table(tmp_path / "p.csv")
    keys = set_keys(table, "csv", images=tmp_path / "images", mpp=0.25)
    found = read_point_set(keys)
    assert [field.mpp for field in found.fields] == [0.5, 0.25]
    assert found.fields[1].path == tmp_path / "images/b/2.tiff"
    write_table(table, TABLE.replace("30,40", "30,64.5"))  # from 1, or a last pixel's far corner
    assert read_point_set(keys).fields[1].points.tolist() == [[10.5, 20], [30, 63.5]]
    write_table(table, TABLE.replace("30,40", "30,65"))
    with pytest.raises(UserError, match=r"field b_2: .*96 x 64 px, found 1 outside, .*\(30, 65\)"):
        read_point_set(keys)
    write_table(table, TABLE + "c.tiff,1,2,mitosis\n")
    with pytest.raises(
        UserError, match="1 of 3 images are missing, first .*c.tiff; see data.images="
    ):
        read_point_set(keys)


def test_the_table_of_cases_adds_what_the_set_does_not_say(tmp_path: Path) -> None:
    table, cases = write_table(tmp_path / "p.csv"), tmp_path / "cases.csv"
    cases.write_text("file,case,scanner,mpp,annotated\nb/2.tiff,p1,s1,0.5,\na.tiff,p1,s2,,0\n")
    keys = set_keys(table, "csv", cases=cases, mpp=0.25)
    found = [
        (field.case, field.scanner, field.mpp, field.annotated)
        for field in read_point_set(keys).fields
    ]
    assert found == [("p1", "s2", 0.25, False), ("p1", "s1", 0.5, True)]


def test_a_table_of_cases_may_say_nothing_of_the_fields_that_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cases = tmp_path / "cases.csv"
    cases.write_text("file,case\na.tiff,p1\n")
    keys = set_keys(write_table(tmp_path / "p.csv"), "csv", cases=cases)
    (field,) = read_point_set(keys, only=["b_2"]).fields
    assert field.case == "b_2"
    assert "says something of 1 of 2 fields; 0 of its files are no field" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("file,case\nz.tiff,p1\n", "expected the files of the fields, as a; found others, as z"),
        ("file,case\na.tiff,p1\na.png,p2\n", "line 3: expected each file once, found a.png twice"),
        (
            "file,mpp\na.tiff,25\n",
            "line 2: expected mpp in um per level-0 pixel, 0.05 to 10, found '25'",
        ),
        ("file,annotated\na.tiff,x\n", "expected annotated 1 or 0, found 'x'"),
        ("file,annotated\nb/2.tiff,0\n", "field b_2: expected annotated 1, found 0 and 2"),
    ],
)
def test_a_table_of_cases_that_cannot_be_used_is_one_line(
    rows: str, message: str, tmp_path: Path
) -> None:
    cases = tmp_path / "cases.csv"
    cases.write_text(rows)
    with pytest.raises(UserError, match=message):
        read_point_set(set_keys(write_table(tmp_path / "p.csv"), "csv", cases=cases))
