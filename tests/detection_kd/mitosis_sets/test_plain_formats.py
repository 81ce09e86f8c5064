"""COCO and GeoJSON: what is written is read back the same, what QuPath and others write is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection_kd.mitosis_sets.checked_fields import find_class
from detection_kd.mitosis_sets.coco_points import write_coco_points
from detection_kd.mitosis_sets.csv_points import write_csv_points
from detection_kd.mitosis_sets.geojson_points import write_geojson_points
from detection_kd.mitosis_sets.keys import read_point_set
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS, AnnotatedField, PointSet
from patch_encoder.slides.picture_file import PictureFile
from tests.detection_kd.mitosis_sets.miniatures import (
    draw_point_set,
    set_keys,
    write_document,
    write_image,
)
from wsi_common.errors import UserError

WRITERS = {"csv": write_csv_points, "coco": write_coco_points, "geojson": write_geojson_points}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("mitotic figure", MITOSIS),
        ("Mitotic Figures", MITOSIS),
        ("Mitosis", MITOSIS),
        ("mitoses", MITOSIS),
        ("atypical mitotic figure", MITOSIS),
        ("non-mitotic figure", LOOK_ALIKE),
        ("not mitotic figure", LOOK_ALIKE),
        ("Nonmitosis", LOOK_ALIKE),
        ("Non-mitotic cell", LOOK_ALIKE),
        ("Mitotic figure look-alike", LOOK_ALIKE),
        ("lookalike", LOOK_ALIKE),
        ("hard negative", LOOK_ALIKE),
        ("hard_negative imposter", LOOK_ALIKE),
        ("mitosis-like", LOOK_ALIKE),
        ("mitotic hot spot", None),
        ("Mitosis region", None),
        ("Eosinophil", None),
        ("Tumor", None),
        ("", None),
    ],
)
def test_classes_are_known_by_their_names(name: str, label: int | None) -> None:
    assert find_class(name) == label


def add_bare_fields(found: PointSet) -> PointSet:
    """And one field in which nothing was found, and one that nobody looked at."""
    bare = np.zeros((0, 2)), np.zeros(0, np.int64)
    empty = AnnotatedField("g0", Path("images/g0.tiff"), "c99", "", None, *bare, look_alikes=True)
    blank = AnnotatedField("g1", Path("images/g1.tiff"), "c99", "", 0.5, *bare, annotated=False)
    return PointSet((*found.fields, empty, blank))


@pytest.mark.parametrize("format", WRITERS)
def test_what_is_written_is_read_back_the_same(format: str, tmp_path: Path) -> None:
    found = add_bare_fields(draw_point_set(cases=3))
    for field in found.fields:
        write_image(tmp_path / field.path, mpp=field.mpp)
    target = tmp_path / "points"
    WRITERS[format](target, found)
    again = read_point_set(set_keys(target, format, images=tmp_path / "images"))
    assert len(again.fields) == len(found.fields) == 8
    for old, new in zip(found.fields, again.fields, strict=True):
        assert tmp_path / old.path == new.path and new.mpp == pytest.approx(old.mpp, abs=1e-4)
        for name in ("field_id", "case", "scanner", "annotated", "look_alikes"):
            assert getattr(old, name) == getattr(new, name), name
        np.testing.assert_allclose(new.points, old.points, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(new.labels, old.labels)


@pytest.mark.parametrize("format", WRITERS)
def test_ids_that_are_no_file_names_are_kept(format: str, tmp_path: Path) -> None:
    one, two = draw_point_set(cases=1).fields
    fields = [
        AnnotatedField(f"0{n}_01", Path(f"part_{n}/0{n}/01.tif"), f"0{n}", "s", 0.25, field.points,
                       field.labels)
        for n, field in ((1, one), (2, two))
    ]  # fmt: skip
    for field in fields:
        write_image(tmp_path / field.path)
    WRITERS[format](tmp_path / "points", PointSet(tuple(fields)))
    again = read_point_set(set_keys(tmp_path / "points", format, images=tmp_path)).fields
    assert [field.field_id for field in again] == ["01_01", "02_01"]
    assert [field.path for field in again] == [tmp_path / field.path for field in fields]


def test_a_coco_document_without_our_entries_is_read(tmp_path: Path) -> None:
    file = write_document(tmp_path / "a.json", ("x/a.jpg", "b.jpg"), [(1, 1, (10, 20, 30, 40))])
    second, first = read_point_set(set_keys(file, "coco", mpp=0.25)).fields
    assert (first.field_id, first.points.tolist()) == ("x_a", [[25, 40]])
    assert second.annotated and not len(second.points) and second.mpp == 0.25


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", "200", "image 1: expected width as a positive number, found '200'"),
        ("mpp", True, "image 1: expected mpp as a positive number, found True"),
        ("mpp", 25.0, "field a: mpp: expected um per level-0 pixel, 0.05 to 10"),
        ("file_name", "../a.jpg", "expected images by their path below images=, found '../a.jpg'"),
    ],
)
def test_numbers_of_a_coco_document_are_checked(
    name: str, value: object, message: str, tmp_path: Path
) -> None:
    file = write_document(tmp_path / "a.json", ("a.jpg",), [(1, 1, (10, 20, 30, 40))])
    document = json.loads(file.read_text())
    document["images"][0][name] = value
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        read_point_set(set_keys(file, "coco"))


def test_a_coco_document_that_is_none_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for document, message in (
        ({"images": [], "annotations": []}, "'categories' is missing"),
        ({"images": [{"id": 1}], "annotations": [], "categories": []}, "'file_name' is missing"),
        ({"images": [], "annotations": [{}], "categories": []}, "expected annotations with image"),
        ({"images": [], "annotations": [], "categories": []}, "expected annotated images as form"),
        (
            {
                "images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}],
                "annotations": [],
                "categories": [],
            },
            "expected unique image ids",
        ),
    ):
        file.write_text(json.dumps(document))
        with pytest.raises(UserError, match=message):
            read_point_set(set_keys(file, "coco"))


def make_feature(kind: str, coordinates: Any, name: str = "Mitosis") -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": "0f2a",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation", "classification": {"name": name}},
    }


RING = [[10, 20], [60, 20], [60, 70], [10, 70], [10, 20]]


def test_points_boxes_and_outlines_of_qupath_are_read(tmp_path: Path) -> None:
    features = [
        make_feature("Point", [1.5, 2.5]),
        make_feature("MultiPoint", [[3, 4], [5, 6]], "non-mitotic figure"),
        make_feature("Polygon", [RING]),
        make_feature("MultiPolygon", [[RING], [[[80, 1], [90, 1], [90, 3], [80, 1]]]]),
    ]
    folder = tmp_path / "points"
    folder.mkdir()
    features[3]["geometry"]["coordinates"][0][0] = [[x + 1, y] for x, y in RING]
    features += [make_feature("Polygon", [RING], "Tumor"), make_feature("Polygon", [RING])]
    features[-1]["properties"].pop("classification")  # regions
    features.append(make_feature("Polygon", [RING], "mitotic hot spot"))  # of detect_mitosis
    (folder / "a.tiff.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": features})
    )
    (folder / "b.geojson").write_text("[]")  # a bare list of features
    write_image(tmp_path / "images/a.tiff", 200, 100)
    for name in ("b", "c"):
        write_image(tmp_path / f"images/{name}.tiff")
    keys = set_keys(folder, "geojson", images=tmp_path / "images")
    first, second, third = read_point_set(keys).fields
    np.testing.assert_array_equal(
        first.points, [[1.5, 2.5], [3, 4], [5, 6], [35, 45], [36, 45], [85, 2]]
    )
    assert first.labels.tolist() == [0, 1, 1, 0, 0, 0] and first.look_alikes
    assert second.annotated and not third.annotated  # found nothing, and did not look
    assert third.path == tmp_path / "images/c.tiff"


def test_positions_count_from_the_scanned_part_of_a_slide_as_in_qupath(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of MRXS, whose scanned part lies within empty glass."""
    monkeypatch.setattr(PictureFile, "bounds", (40, 7))
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    field = AnnotatedField("a", tmp_path / "a.png", "a", "", 0.25, np.array([[50.0, 30.0]]),
                           np.array([MITOSIS]))  # fmt: skip
    write_geojson_points(tmp_path / "points", PointSet((field,)))
    written = json.loads((tmp_path / "points/a.geojson").read_text())
    assert written["features"][0]["geometry"]["coordinates"] == [10, 23]
    again = read_point_set(set_keys(tmp_path / "points", "geojson", images=tmp_path))
    assert again.fields[0].points.tolist() == [[50, 30]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(geometry=None), "feature 0: expected a geometry and a classification"),
        (lambda f: f["properties"].pop("classification"), "found 'no class'"),
        (lambda f: f.update(properties=[1]), "expected a geometry and a classification"),
        (lambda f: f["properties"]["classification"].update(name="Tumor"), "found 'Tumor'"),
        (lambda f: f["geometry"].update(type="LineString"), "found LineString"),
        (lambda f: f["geometry"].update(coordinates=[1]), "with coordinates, found Point"),
        (lambda f: f["geometry"].update(coordinates={}), "with coordinates, found Point"),
    ],
)
def test_what_is_wrong_in_geojson_is_one_line(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    feature = make_feature("Point", [1, 2])
    change(feature)
    file = tmp_path / "a.geojson"
    file.write_text(json.dumps({"features": [feature]}))
    with pytest.raises(UserError, match=message):
        read_point_set(set_keys(file, "geojson"))


def test_geojson_without_image_and_folders_without_geojson_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="expected files <image>.geojson, found none"):
        read_point_set(set_keys(tmp_path / "images", "geojson"))
    file = tmp_path / "a.geojson"
    file.write_text(json.dumps({"features": [make_feature("Point", [1, 2])]}))
    with pytest.raises(UserError, match="expected an image a below"):
        read_point_set(set_keys(file, "geojson", images=tmp_path / "images"))
    file.write_text(json.dumps({"features": [], "field": 1}))
    with pytest.raises(UserError, match="expected the member 'field' as an object, found 1"):
        read_point_set(set_keys(file, "geojson"))
    file.write_text(json.dumps({"type": "Feature"}))
    with pytest.raises(UserError, match="expected a GeoJSON feature collection"):
        read_point_set(set_keys(file, "geojson"))
