"""The folders of TUPAC16 and MITOS-ATYPIA14: which number is the row, what an empty table says,
which frames nobody annotated, and who is the same patient.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from detection_kd.mitosis_sets.keys import read_point_set
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS
from detection_kd.mitosis_sets.splits import split_fields
from tests.detection_kd.mitosis_sets.miniatures import set_keys, write_image
from wsi_common.errors import UserError


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def tupac(tmp_path: Path) -> Path:
    """The alternative labels: two regions of case 01, one of case 30."""
    root = write_files(
        tmp_path / "TUPAC_AL",
        {
            "mitoses_ground_truth/01/01.csv": "39,2\n10,80\n",
            "mitoses_ground_truth/01/02.csv": "",
            "mitoses_ground_truth/30/01.csv": "0,5,0.9\n",
            "nonmitoses_ground_truth/01/01.csv": "20,30\n",
        },
    )
    for name in ("part_1/01/01", "part_1/01/02", "part_1/01/03", "part_2/30/01"):
        write_image(tmp_path / f"images/{name}.tif", mpp=None)
    return root


def test_tupac_tables_hold_row_and_column_and_may_be_empty_or_absent(tupac: Path) -> None:
    keys = set_keys(tupac, "tupac16", images=tupac.parent / "images")
    found = {field.field_id: field for field in read_point_set(keys).fields}
    assert list(found) == ["01_01", "01_02", "01_03", "30_01"]
    np.testing.assert_array_equal(found["01_01"].points, [[2.5, 39.5], [80.5, 10.5], [30.5, 20.5]])
    assert found["01_01"].labels.tolist() == [MITOSIS, MITOSIS, LOOK_ALIKE]
    for name in ("01_02", "01_03"):  # an empty table, and none
        assert found[name].annotated and not len(found[name].points)
    assert found["30_01"].path == tupac.parent / "images/part_2/30/01.tif"
    assert [field.case for field in found.values()] == ["01", "01", "01", "30"]
    assert found["01_01"].scanner != found["30_01"].scanner
    assert {field.mpp for field in found.values()} == {0.25}
    assert all(field.look_alikes for field in found.values())


def test_an_image_knows_its_resolution_better_than_the_set_and_a_table_best(tupac: Path) -> None:
    images = tupac.parent / "images"
    write_image(images / "part_1/01/01.tif", mpp=0.5)
    write_image(images / "part_1/01/02.tif", mpp=0.5)
    cases = tupac.parent / "cases.csv"
    cases.write_text("file,mpp\n01/02.tif,0.3\n")
    found = read_point_set(set_keys(tupac, "tupac16", images=images, cases=cases, mpp=1.0))
    assert [field.mpp for field in found.fields] == pytest.approx([0.5, 0.3, 0.25, 0.25])


def test_tupac_positions_counted_from_one_never_leave_the_image(tupac: Path) -> None:
    keys = set_keys(tupac, "tupac16", images=tupac.parent / "images", first_index=1)
    found = read_point_set(keys).fields
    assert found[0].points.tolist()[0] == [1.5, 38.5]
    assert found[3].points.tolist() == [[4.5, 0.5]]  # row 0 is moved to the border, not round it


def test_tupac_without_images_has_the_regions_with_tables(tupac: Path) -> None:
    found = read_point_set(set_keys(tupac / "mitoses_ground_truth", "tupac16"))
    assert [field.field_id for field in found.fields] == ["01_01", "01_02", "30_01"]
    assert found.fields[0].path == Path("01/01.tif") and found.count(LOOK_ALIKE) == 1


def test_the_original_labels_have_no_look_alikes_and_cases_without_zeros(tupac: Path) -> None:
    shutil.rmtree(tupac / "nonmitoses_ground_truth")
    (tupac / "mitoses_ground_truth/01").rename(tupac / "mitoses_ground_truth/1")
    keys = set_keys(tupac, "tupac16", splits="tupac16_uts")
    found = read_point_set(keys)
    assert not any(field.look_alikes for field in found.fields)
    sides = split_fields(found, keys, 0)
    assert sides["train"].cases == ["01"] and sides["val"].cases == ["30"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mitoses_ground_truth/01/09.csv", "1,2\n", "none of 01/09 .1 of 4."),
        ("mitoses_ground_truth/01/01.csv", "1\n", "01.csv line 1: expected two numbers, found '1'"),
        ("mitoses_ground_truth/01/01.csv", "row,col\n", "line 1: expected two numbers, found 'row"),
        ("mitoses_ground_truth/01/01.csv", "70,2\n", r"field 01_01: .*96 x 64 px.*\(2.5, 70.5\)"),
        ("mitoses_ground_truth/01/01.csv", "20,30\n", "field 01_01: expected one class per"),
        ("mitoses_ground_truth/1/01.csv", "1,2\n", "expected one file of 01/01, found"),
    ],
)
def test_what_is_wrong_in_tupac_tables_is_one_line(
    name: str, text: str, message: str, tupac: Path
) -> None:
    write_files(tupac, {name: text})
    with pytest.raises(UserError, match=message) as caught:
        read_point_set(set_keys(tupac, "tupac16", images=tupac.parent / "images"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a folder mitoses_ground_truth, found none"):
        read_point_set(set_keys(tmp_path, "tupac16"))
    with pytest.raises(UserError, match="expected tables <frame>_mitosis.csv, found none"):
        read_point_set(set_keys(tmp_path, "mitos_atypia14"))


@pytest.fixture
def mitos(tmp_path: Path) -> Path:
    """Two patients on both scanners, one frame of the challenge's test part."""
    root = write_files(
        tmp_path / "MITOS14",
        {
            "Training Aperio/A03/A03/mitosis/A03_00Aa_mitosis.csv": "10,20,1.0\n10,20,1.0\n\n",
            "Training Aperio/A03/A03/mitosis/A03_00Aa_not_mitosis.csv": "30,40,0.2\n,,\n",
            "Training Aperio/A04/A04/mitosis/A04_00Bc_mitosis.csv": "1,2,0.65\n",
            "Training Aperio/A04/A04/mitosis/A04_00Bc_not_mitosis.csv": "",
            "Training Hamamatsu/H03/H03/mitosis/H03_00Aa_mitosis.csv": "",
            "Training Hamamatsu/H03/H03/mitosis/H03_00Aa_not_mitosis.csv": "5,6,0.1\n",
        },
    )
    frames = (
        "Training Aperio/A03/A03/frames/x40/A03_00Aa",
        "Testing Aperio/A06/frames/x40/A06_01Dd",
    )
    frames += (
        "Training Aperio/A04/A04/frames/x40/A04_00Bc",
        "Training Aperio/A03/A03/frames/x20/A03_00A",
    )
    for name in (*frames, "Training Hamamatsu/H03/H03/frames/x40/H03_00Aa"):
        write_image(root / f"{name}.tiff", mpp=None)
    return root


def test_mitos_tables_hold_column_and_row_of_frames_at_40x(mitos: Path) -> None:
    found = {
        field.field_id: field
        for field in read_point_set(set_keys(mitos, "mitos_atypia14", images=mitos)).fields
    }
    assert list(found) == ["A03_00Aa", "A04_00Bc", "A06_01Dd", "H03_00Aa"]  # none of x20
    np.testing.assert_array_equal(found["A03_00Aa"].points, [[10.5, 20.5], [30.5, 40.5]])
    assert found["A03_00Aa"].labels.tolist() == [MITOSIS, LOOK_ALIKE]  # the repeated one is gone
    assert found["A04_00Bc"].look_alikes and not found["A06_01Dd"].look_alikes
    assert [field.annotated for field in found.values()] == [True, True, False, True]
    assert [field.mpp for field in found.values()] == [0.2455, 0.2455, 0.2455, 0.2274]
    assert found["A03_00Aa"].path.parent.name == "x40"


def test_both_scans_of_a_patient_are_one_case(mitos: Path) -> None:
    keys = set_keys(mitos, "mitos_atypia14", splits="mitos_atypia14_uts")
    found = read_point_set(keys)
    cases = {field.field_id: field.case for field in found.fields}
    assert cases == {"A03_00Aa": "03", "A04_00Bc": "04", "H03_00Aa": "03"}
    assert len({field.scanner for field in found.fields}) == 2
    keys.splits = ""
    sides = split_fields(found, keys, 0, shares=(0.5, 0.0, 0.5))
    assert sorted(sides["train"].cases + sides["test"].cases) == ["03", "04"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x/A05_00Aa_mitosis.csv", "1,2,1\n", "expected x40/A05_00Aa.tiff .* none .1 of 4"),
        ("x/A03_00Aa_mitosis.csv", "1,2,1\n", "expected one A03_00Aa_mitosis.csv, found"),
        (
            "Training Aperio/A03/A03/mitosis/A03_00Aa_mitosis.csv",
            "10,x,1\n",
            "line 1: expected two",
        ),
        ("Training Aperio/A03/A03/mitosis/A03_00Aa_mitosis.csv", "30,40,1\n", "one class per"),
        ("Training Aperio/A03/A03/mitosis/A03_00Aa_mitosis.csv", "130,40,1\n", "96 x 64 px"),
    ],
)
def test_what_is_wrong_in_mitos_tables_is_one_line(
    name: str, text: str, message: str, mitos: Path
) -> None:
    write_files(mitos, {name: text})
    with pytest.raises(UserError, match=message) as caught:
        read_point_set(set_keys(mitos, "mitos_atypia14", images=mitos))
    assert "\n" not in str(caught.value)


def test_a_frame_of_another_name_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"frame1_mitosis.csv": "1,2,1\n"})
    with pytest.raises(UserError, match="expected frames as A03_00Aa, found 'frame1'"):
        read_point_set(set_keys(tmp_path, "mitos_atypia14"))
