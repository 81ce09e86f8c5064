"""Databases and JSON files of SlideRunner: classes by name, middles of shapes, what is deleted."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from detection_kd.mitosis_sets.keys import read_point_set
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS
from tests.detection_kd.mitosis_sets.miniatures import set_keys, write_document
from wsi_common.errors import UserError

# SlideRunner's own tables, as of its version 1; the classes are numbered as in CCMCT, not as here
TABLES = """
CREATE TABLE Slides (uid INTEGER PRIMARY KEY AUTOINCREMENT, filename TEXT, width INTEGER,
    height INTEGER, directory TEXT);
CREATE TABLE Classes (uid INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, color TEXT);
CREATE TABLE Annotations (uid INTEGER PRIMARY KEY AUTOINCREMENT, slide INTEGER, type INTEGER,
    agreedClass INTEGER, deleted INTEGER DEFAULT 0);
CREATE TABLE Annotations_coordinates (uid INTEGER PRIMARY KEY AUTOINCREMENT, coordinateX INTEGER,
    coordinateY INTEGER, slide INTEGER, annoId INTEGER, orderIdx INTEGER);
INSERT INTO Slides (filename, width, height) VALUES ('a.svs', 200, 100), ('b.svs', 200, 100),
    ('c.svs', NULL, NULL);
INSERT INTO Classes (name) VALUES ('Granulocyte'), ('Mitotic figure'), ('Mitotic figure look-alike');
"""
SPOT, BOX, POLYGON = 1, 2, 3
Shape = tuple[int, int, int | None, int, Sequence[tuple[int, int]]]
SHAPES: list[Shape] = [
    (1, BOX, 2, 0, [(10, 20), (60, 70)]),
    (1, SPOT, 3, 0, [(5, 6)]),
    (1, POLYGON, 2, 0, [(100, 10), (120, 10), (120, 30), (100, 30), (100, 10)]),
    (1, SPOT, 1, 0, [(50, 50)]),
    (1, SPOT, None, 0, [(51, 50)]),
    (1, SPOT, 2, 1, [(52, 50)]),
    (2, BOX, 2, 0, [(-20, 20), (30, 70)]),
    (2, BOX, 2, 0, [(-40, 30), (10, 80)]),
]


def write_database(path: Path, shapes: Sequence[Shape] = SHAPES, tables: str = TABLES) -> Path:
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(tables)
        for number, (slide, kind, agreed, deleted, corners) in enumerate(shapes, start=1):
            columns, values = "slide, type, agreedClass", [slide, kind, agreed]
            if "deleted" in tables:
                columns, values = f"{columns}, deleted", [*values, deleted]
            database.execute(
                f"INSERT INTO Annotations ({columns}) VALUES ({', '.join('?' * len(values))})",
                values,
            )
            for order, (x, y) in enumerate(corners, start=1):
                database.execute(
                    "INSERT INTO Annotations_coordinates (coordinateX, coordinateY, slide, annoId, "
                    "orderIdx) VALUES (?, ?, ?, ?, ?)",
                    (x, y, slide, number, order),
                )
        database.commit()
    return path


def test_a_database_gives_the_middles_of_its_shapes_by_class_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    database = write_database(tmp_path / "MEL.sqlite")
    first, second, third = read_point_set(set_keys(database, "ccmct", mpp=0.25)).fields
    np.testing.assert_array_equal(first.points, [[35, 45], [5, 6], [110, 20]])
    assert first.labels.tolist() == [MITOSIS, LOOK_ALIKE, MITOSIS]
    # the middle (-15, 55) of a box over the border is moved to it
    np.testing.assert_array_equal(second.points, [[5, 45], [0.5, 55]])
    assert (first.field_id, first.case, first.path) == ("a", "a", Path("a.svs"))
    assert first.annotated and first.look_alikes and first.mpp == 0.25
    assert not third.annotated and not third.look_alikes
    assert "left out: 1 Granulocyte, 1 without agreed class" in caplog.text


def test_a_database_without_a_mark_for_deletion_is_read(tmp_path: Path) -> None:
    tables = TABLES.replace(", deleted INTEGER DEFAULT 0", "")
    database = write_database(tmp_path / "old.sqlite", SHAPES[:3], tables)
    assert read_point_set(set_keys(database, "ccmct")).count(MITOSIS) == 2


def test_a_database_is_never_written_to(tmp_path: Path) -> None:
    database = write_database(tmp_path / "MEL.sqlite")
    database.chmod(0o444)
    before = database.read_bytes()
    read_point_set(set_keys(database, "ccmct"))
    assert database.read_bytes() == before and list(tmp_path.iterdir()) == [database]


def test_json_holds_corners_and_other_cells(tmp_path: Path) -> None:
    classes = [{"id": 7, "name": "Mitotic figures"}, {"id": 1, "name": "Eosinophils"}]
    classes += [{"id": 3, "name": "Hard negative lookalikes"}]
    boxes = [(1, 7, (10, 20, 60, 70)), (1, 1, (0, 0, 50, 50)), (1, 3, (100, 0, 150, 50))]
    file = write_document(tmp_path / "MEL.json", ("a.svs", "b.svs"), boxes, classes)
    first, second = read_point_set(set_keys(file, "ccmct")).fields
    np.testing.assert_array_equal(first.points, [[35, 45], [125, 25]])
    assert first.labels.tolist() == [MITOSIS, LOOK_ALIKE] and not second.annotated


@pytest.mark.parametrize(
    ("shapes", "tables", "message"),
    [
        ([(9, SPOT, 2, 0, [(1, 2)])], TABLES, "expected annotations of listed slides, found slide"),
        ([(1, SPOT, 2, 0, [(300, 2)])], TABLES, r"field a: .*200 x 100 px.*\(300, 2\)"),
        ([(1, SPOT, 1, 0, [(30, 2)])], TABLES, "expected mitotic figures, found none in 3 fields"),
        (
            [],
            "CREATE TABLE Slides (uid INTEGER);",
            "expected a SlideRunner database, found no such",
        ),
    ],
)
def test_what_is_wrong_in_a_database_is_one_line(
    shapes: list[Shape], tables: str, message: str, tmp_path: Path
) -> None:
    database = write_database(tmp_path / "MEL.sqlite", shapes, tables)
    with pytest.raises(UserError, match=message) as caught:
        read_point_set(set_keys(database, "ccmct"))
    assert "\n" not in str(caught.value)


def test_what_is_no_database_and_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("hello")
    with pytest.raises(UserError, match="expected a SlideRunner database or its JSON as JSON"):
        read_point_set(set_keys(file, "ccmct"))
    with pytest.raises(UserError, match="expected a SlideRunner database or its JSON, found none"):
        read_point_set(set_keys(tmp_path, "ccmct"))
