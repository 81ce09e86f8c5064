"""Boxes and points of four other layouts become COCO: by hand, and BCCD's own XML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection_kd.box_sets.boxed_pictures import PictureFolder
from detection_kd.box_sets.voc import read_voc
from detection_kd.convert_annotations import Config, main
from detection_kd.datasets.coco import DetectionSet, read_coco
from wsi_common.cli import run
from wsi_common.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.png of 100 x 50 px, and sub/b.png."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (100, 50)).save(folder / name)
    return folder


def convert(images: Path, boxes: Path, layout: str, *changes: str) -> int:
    out = images.parent / "out"
    words = [f"boxes={boxes}", f"layout={layout}", f"images={images}", f"output={out}", *changes]
    return run(main, Config, words)


def read(images: Path) -> DetectionSet:
    return read_coco(images.parent / "out" / "annotations.json", images)


def found(images: Path) -> dict[str, list[tuple[str, list[float], bool]]]:
    """Class, box and crowd flag of every annotation, by the picture's name."""
    content = read(images)
    return {
        record.path.relative_to(images).as_posix(): [
            (content.categories[label], box.tolist(), bool(crowd))
            for label, box, crowd in zip(record.labels, record.boxes, record.crowd, strict=True)
        ]
        for record in content.images
    }


def voc_object(name: str, corners: tuple[object, ...], difficult: int = 0) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{box}</bndbox></object>"
    )


def write_voc(folder: Path, name: str, filename: str, *objects: str) -> None:
    folder.mkdir(exist_ok=True)
    text = f"<annotation><filename>{filename}</filename>{''.join(objects)}</annotation>"
    (folder / f"{name}.xml").write_text(text)


def test_pascal_voc(images: Path, tmp_path: Path) -> None:
    xml = tmp_path / "xml"
    write_voc(
        xml,
        "a",
        "a.png",
        voc_object("rbc", (1, 2, 11, 22)),
        voc_object("rbc", (5, 5, 5, 9)),  # no area
        voc_object("wbc", (5, 5, 9, 9), 1),
    )
    write_voc(xml, "b", "renamed.jpg")  # the name inside is an old one
    assert convert(images, xml, "voc") == 0
    assert found(images) == {
        "a.png": [("rbc", [1, 2, 11, 22], False), ("wbc", [5, 5, 9, 9], True)],
        "sub/b.png": [],
    }
    # the published sets count from 1, and a box ends with its last pixel
    assert convert(images, xml, "voc", "first_index=1", "overwrite=true") == 0
    assert found(images)["a.png"][0] == ("rbc", [0, 1, 11, 22], False)
    assert convert(images, xml, "voc") == 2  # there already
    assert convert(images, xml, "voc", "first_index=2", "overwrite=true") == 2


@pytest.mark.parametrize(
    "bad",
    [
        voc_object("", (1, 1, 5, 9)),
        voc_object("rbc", ("x", 1, 5, 9)),
        "<object><name>x</name></object>",
        "<object>",
    ],
)
def test_pascal_voc_refusals(bad: str, images: Path, tmp_path: Path) -> None:
    write_voc(tmp_path / "xml", "a", "a.png", bad)
    with pytest.raises(UserError, match=r"a\.xml"):
        read_voc(tmp_path / "xml", images)


def test_bccd_from_its_own_xml_is_bccd_as_coco(real_data: Path) -> None:
    folder = real_data / "bccd"
    known = read_coco(folder / "coco_derived.json", folder / "JPEGImages")
    by_name = {record.path.name: record for record in known.images}
    for picture in read_voc(folder / "Annotations", folder / "JPEGImages")[:40]:
        record = by_name[picture.file_name]
        ours = np.clip(np.array(picture.boxes).reshape(-1, 4), 0, [640, 480] * 2)
        both = sorted(zip(picture.labels, ours.tolist(), strict=True))
        names = [known.categories[label] for label in record.labels]
        assert both == sorted(zip(names, record.boxes.tolist(), strict=True))


def test_yolo(images: Path, tmp_path: Path) -> None:
    labels, names = tmp_path / "labels", tmp_path / "data.yaml"
    (labels / "sub").mkdir(parents=True)
    (labels / "sub" / "b.txt").write_text(
        "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.2 0.6\n"  # a box, and an outline
    )
    (labels / "classes.txt").write_text("cell\nlesion\n")  # no picture's
    names.write_text("names: {0: cell, 1: lesion}")
    assert convert(images, labels, "yolo", f"class_names={names}") == 0
    b = found(images)["sub/b.png"]
    assert [name for name, _, _ in b] == ["lesion", "cell"]
    assert np.allclose([box for _, box, _ in b], [[40, 15, 60, 35], [10, 10, 30, 30]])
    assert found(images)["a.png"] == []  # without a file nothing is there
    assert read(images).categories == ["cell", "lesion"]
    again = (f"class_names={labels}/classes.txt", "overwrite=true")
    assert convert(images, labels, "yolo", *again) == 0
    assert found(images)["sub/b.png"] == b


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("2 0.5 0.5 0.2 0.4", "a"),
        ("-1 0.5 0.5 0.2 0.4", "a"),
        ("0 0.5 0.5 0.2", "a"),
        ("0 50 50 20 40", "a"),
        ("0 0.5 0.5 0.2 0.4 0.9", "a"),
        ("0 0.5 nan 0.2 0.4", "a"),
        ("0 0.5 0.5 0.2 0.4", "nobody"),
    ],
)
def test_yolo_refusals(
    text: str, file: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / f"{file}.txt").write_text(text)
    (tmp_path / "classes.txt").write_text("cell\nlesion\n")
    assert convert(images, labels, "yolo", f"class_names={tmp_path}/classes.txt") == 2
    assert f"{file}.txt" in capsys.readouterr().err


def test_yolo_needs_names(images: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    assert convert(images, tmp_path / "labels", "yolo") == 2
    for text in ("names: [a, a]", "names: {1: a}", "nothing: 1", "names: ["):
        (tmp_path / "data.yaml").write_text(text)
        words = (f"class_names={tmp_path}/data.yaml",)
        assert convert(images, tmp_path / "labels", "yolo", *words) == 2


def feature(kind: str, positions: Any, name: str | None) -> dict[str, Any]:
    about = {} if name is None else {"classification": {"name": name}}
    geometry = {"type": kind, "coordinates": positions}
    return {"type": "Feature", "geometry": geometry, "properties": about}


def test_qupath(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "geojson"
    folder.mkdir()
    triangle = [[[10, 5], [30, 5], [20, 25], [10, 5]], [[12, 6], [90, 40], [12, 6]]]  # and a hole
    features = [
        feature("Polygon", triangle, "gland"),
        feature("MultiPoint", [[50, 20], [60, 30]], "mitosis"),
        feature("MultiPolygon", [triangle, [[[0, 0], [4, 0], [4, 4]]]], "gland"),
        feature("Polygon", triangle, None),
    ]
    (folder / "a.png.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": features})
    )
    (folder / "sub_b.geojson").write_text("[]")
    assert convert(images, folder, "qupath", "point_side=8") == 0
    assert found(images) == {
        "a.png": [
            ("gland", [10, 5, 30, 25], False),
            ("mitosis", [46, 16, 54, 24], False),
            ("mitosis", [56, 26, 64, 34], False),
            ("gland", [10, 5, 30, 25], False),
            ("gland", [0, 0, 4, 4], False),
        ],
        "sub/b.png": [],
    }


def test_qupath_refusals(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.geojson"
    for content in (
        {"features": [feature("Circle", [1, 2], "x")]},
        {"features": [{"type": "Feature"}]},
        {"features": [feature("Polygon", [], "x")]},
        {"nothing": 1},
    ):
        file.write_text(json.dumps(content))
        assert convert(images, file, "qupath") == 2
    file.rename(tmp_path / "nobody.geojson")
    assert convert(images, tmp_path / "nobody.geojson", "qupath") == 2


def test_points_of_a_table(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "points.csv"
    table.write_text("file,x,y,class\na.png,50,20,mitosis\na,2,3,look-alike\nsub/b.png,,,\n")
    assert convert(images, table, "points", "point_side=10") == 0
    assert found(images) == {
        "a.png": [("mitosis", [45, 15, 55, 25], False), ("look-alike", [0, 0, 7, 8], False)],
        "sub/b.png": [],
    }
    for row in ("a.png,500,20,mitosis", "a.png,x,20,mitosis", "a.png,5,20,", "c.png,5,20,mitosis"):
        table.write_text(f"file,x,y,class\n{row}\n")
        assert convert(images, table, "points", "overwrite=true") == 2


def test_a_set_without_boxes_is_refused(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "points.csv"
    table.write_text("file,x,y,class\na.png,,,\n")
    assert convert(images, table, "points") == 2
    assert not (tmp_path / "out" / "annotations.json").exists()


def test_names_of_pictures(tmp_path: Path) -> None:
    for name in ("x/a.png", "y/a.png", "x/b.png", "c.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pictures = PictureFolder(tmp_path)
    assert pictures.find("x/a.png", "s") == "x/a.png"
    assert pictures.find("y\\a", "s") == "y/a.png"
    assert pictures.find("b.jpg", "s") == "x/b.png"
    with pytest.raises(UserError, match="may be"):
        pictures.find("a.png", "s")
    with pytest.raises(UserError, match="no picture 'd'"):
        pictures.find("d", "s")


NAN = float("nan")


@pytest.mark.parametrize(
    ("layout", "files", "expected"),
    [
        ("voc", {"a.xml": voc_object("x", ("nan", 1, 5, 5))}, "box of finite numbers, found .nan"),
        ("qupath", {"a.png.geojson": ("Point", [NAN, 3])}, "box of finite numbers"),
        ("qupath", {"a.png.geojson": ("Polygon", [[]])}, "feature 0: expected a geometry"),
        ("yolo", {"a.txt": b"0 .5 .5 .1 .1 \xff"}, "expected boxes of YOLO in UTF-8"),
        ("yolo", {"a.txt": b"0 .5 .5 .1 .1", "names.yaml": b"- \xff"}, "names of classes in UTF-8"),
        ("yolo", {"a.txt": b"", "names.yaml": b"names: {1: k, 2: m}"}, "of the classes 0 to 1"),
        ("yolo", {"a.txt": b"0 .5 .5 .1 .1", "a.jpg": b""}, "found a.jpg and a.png"),
    ],
)
def test_hostile_files_are_one_line(
    layout: str,
    files: dict[str, Any],
    expected: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    boxes = tmp_path / "boxes"
    boxes.mkdir()
    (boxes / "names.yaml").write_text('names: {"0": cell, "1": lesion}')
    for name, content in files.items():
        if name == "a.jpg":
            Image.new("RGB", (100, 50)).save(images / name)
        elif isinstance(content, bytes):
            (boxes / name).write_bytes(content)
        elif layout == "voc":
            write_voc(boxes, "a", "a.png", content)
        else:
            (boxes / name).write_text(json.dumps([feature(*content, "x")]))
    words = (f"class_names={boxes}/names.yaml",) if layout == "yolo" else ()
    assert convert(images, boxes, layout, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(expected, error), error


@pytest.mark.parametrize("layout", ["voc", "yolo", "qupath"])
def test_boxes_without_an_area_in_their_picture_are_left_out(
    layout: str, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A line, and for the layouts that can say it a box beside the picture."""
    boxes = tmp_path / "boxes"
    boxes.mkdir()
    (boxes / "classes.txt").write_text("cell\n")
    (boxes / "a.txt").write_text("0 .5 .5 0 .2\n0 .5 .5 .1 .2\n")
    shapes = [[[5, 5], [5, 9]], [[300, 5], [400, 9]]]
    lines = [feature("LineString", shape, "cell") for shape in shapes]
    lines.append(feature("Polygon", [[[45, 20], [55, 20], [55, 30]]], "cell"))
    (boxes / "a.png.geojson").write_text(json.dumps(lines))
    objects = [(5, 5, 5, 9), (300, 5, 400, 9), (45, 20, 55, 30)]
    write_voc(boxes, "a", "a.png", *(voc_object("cell", corners) for corners in objects))
    words = (f"class_names={boxes}/classes.txt",) if layout == "yolo" else ()
    assert convert(images, boxes, layout, *words) == 0
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [entry["bbox"] for entry in content["annotations"]] == [[45.0, 20.0, 10.0, 10.0]]
    assert caplog.text.count("has no area inside its picture") == (1 if layout == "yolo" else 2)
