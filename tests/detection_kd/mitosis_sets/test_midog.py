"""MIDOG files: corners instead of sizes, images that nobody annotated, scanners by number, and what
the real file holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection_kd.mitosis_sets.keys import read_point_set
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS
from tests.detection_kd.mitosis_sets.miniatures import set_keys, write_document
from wsi_common.errors import UserError

BOXES = [(1, 1, (10, 20, 60, 70)), (1, 2, (100, 20, 150, 70)), (3, 2, (0, 0, 50, 50))]
NAMES = ("001.tiff", "002.tiff", "003.tiff")


def test_boxes_are_corners_and_images_without_any_are_not_annotated(tmp_path: Path) -> None:
    file = write_document(tmp_path / "MIDOG.json", NAMES, BOXES)
    first, second, third = read_point_set(set_keys(file, "midog")).fields
    np.testing.assert_array_equal(first.points, [[35, 45], [125, 45]])
    np.testing.assert_array_equal(first.labels, [MITOSIS, LOOK_ALIKE])
    np.testing.assert_array_equal(first.mitoses, [[35, 45]])
    assert (first.field_id, first.path, first.case) == ("001", Path("001.tiff"), "001")
    assert first.annotated and third.annotated and first.look_alikes
    assert not second.annotated and not second.look_alikes and not len(second.points)
    assert first.scanner == "" and first.mpp is None  # no MIDOG file by its own words


def test_a_box_over_the_border_is_moved_to_it_and_one_beyond_is_refused(tmp_path: Path) -> None:
    boxes = [(1, 1, (-27, 20, 23, 70)), (1, 2, (160, 70, 210, 120))]
    file = write_document(tmp_path / "MIDOG.json", NAMES, boxes)
    np.testing.assert_array_equal(
        read_point_set(set_keys(file, "midog")).fields[0].points, [[0.5, 45], [185, 95]]
    )
    file = write_document(tmp_path / "MIDOG.json", NAMES, [(1, 1, (-60, 20, -10, 70))])
    with pytest.raises(UserError, match=r"field 001: .*200 x 100 px, found 1 outside, .*\(-35, 45"):
        read_point_set(set_keys(file, "midog"))


def test_sizes_instead_of_corners_are_refused(tmp_path: Path) -> None:
    file = write_document(tmp_path / "a.json", NAMES, [(1, 1, (100, 20, 50, 50))])
    with pytest.raises(UserError, match=r"annotation 1: expected a box with an area.*format=coco"):
        read_point_set(set_keys(file, "midog"))
    read_point_set(set_keys(file, "coco"))


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ((9, 1, (0, 0, 50, 50)), "image_id 9 is not among the 3 images"),
        ((1, 9, (0, 0, 50, 50)), r"category_id 9 is not among \[1, 2\]"),
        (([1], 1, (0, 0, 50, 50)), "expected annotations with image_id, category_id"),
        ((1, {}, (0, 0, 50, 50)), "expected annotations with image_id, category_id"),
        ((1, 1, (0, 0, 50)), "expected a bbox of 4 numbers"),
        ((1, 1, (0, 0, float("nan"), 50)), "expected a box with an area"),
        ((1, 2, (10, 20, 60, 70)), r"expected one class per position, found both at \(35, 45\)"),
        ((2, 2, (10, 20, 60, 70)), "expected mitotic figures, found none"),
    ],
)
def test_what_is_wrong_in_a_document_is_one_line(
    annotation: tuple[Any, Any, tuple[float, ...]], message: str, tmp_path: Path
) -> None:
    boxes = [annotation] if "none" in message else [BOXES[0], annotation]
    file = write_document(tmp_path / "MIDOG.json", NAMES, boxes)
    with pytest.raises(UserError, match=message) as caught:
        read_point_set(set_keys(file, "midog"))
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    classes = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "lymphocyte"}]
    file = write_document(tmp_path / "MIDOG.json", NAMES, BOXES, classes)
    with pytest.raises(UserError, match="found 'lymphocyte'"):
        read_point_set(set_keys(file, "midog"))


def test_a_position_that_is_annotated_twice_counts_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_document(tmp_path / "MIDOG.json", NAMES, [*BOXES, BOXES[0]])
    found = read_point_set(set_keys(file, "midog"))
    assert found.count(MITOSIS) == 1 and found.count(LOOK_ALIKE) == 2
    assert "field 001: points that are annotated more than once and count once: 1" in caplog.text


def test_scanners_go_by_the_number_of_an_image(tmp_path: Path) -> None:
    names = ("001.tiff", "051.tiff", "101.tiff", "151.tiff", "152.tiff", "201.tiff")
    boxes = [(number, 1, (10, 20, 60, 70)) for number in (1, 2, 3, 5, 6)]
    file = write_document(tmp_path / "MIDOG.json", names, boxes, description="MIDOG 2021")
    found = {
        field.field_id: (field.scanner, field.mpp)
        for field in read_point_set(set_keys(file, "midog")).fields
    }
    assert found == {
        "001": ("Hamamatsu XR", 0.23),
        "051": ("Hamamatsu S360", 0.23),
        "101": ("Aperio CS2", 0.25),
        "151": ("Leica GT450", 0.26),
        "152": ("", None),  # annotated: another tumour of MIDOG 2022
        "201": ("", None),
    }


def test_the_real_file_has_the_published_counts(real_data: Path, root: Path) -> None:
    folder = real_data / "midogpp_annotations"
    keys = set_keys(folder / "MIDOG++.json", "midog", cases=root / "configs/uts/midogpp_cases.csv")
    found = read_point_set(keys)
    assert len(found.fields) == 553 and len(found.cases) == 553
    assert (found.count(MITOSIS), found.count(LOOK_ALIKE)) == (11_937, 14_349)
    first = found.select(lambda field: int(field.field_id) <= 150)
    assert (first.count(MITOSIS), first.count(LOOK_ALIKE)) == (1_721, 2_714)
    assert all(field.annotated for field in first.fields)
    blank = [field.field_id for field in found.fields if not field.annotated]
    assert blank == [f"{number}" for number in range(151, 201)]
    scanners = {field.scanner for field in found.fields}
    assert scanners == {"Hamamatsu XR", "Hamamatsu S360", "Aperio CS2", "Leica GT450", "3D Histech"}
    # two of 26,286 centres lie outside their image, whose boxes reach into it
    assert np.concatenate([field.points for field in found.fields]).min() == 0.5
