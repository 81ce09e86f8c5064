"""labels.csv and the tree of slides."""

from __future__ import annotations

from pathlib import Path

import pytest

from patch_encoder.cohort.labels import list_class_names, read_labels
from patch_encoder.cohort.slide_files import find_slides, locate_slides
from wsi_common.errors import UserError


def labels(tmp_path: Path, text: str) -> Path:
    (tmp_path / "labels.csv").write_text(text)
    return tmp_path / "labels.csv"


def test_ids_keep_their_zeros_and_optional_columns_are_optional(tmp_path: Path) -> None:
    records = read_labels(
        labels(tmp_path, "slide_id,label,case_id,split,mpp\n007,POS,01,train,0.25\n008,NILM,01,,\n")
    )
    assert [(r.case_id, r.slide_id, r.label, r.split, r.mpp) for r in records] == [
        ("01", "007", "POS", "train", 0.25),
        ("01", "008", "NILM", None, None),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("case_id,slide_id\n1,2\n", "'label' is missing"),
        ("case_id,slide_id,label\n1,2,a\n1,2,b\n", "more than once, first '2'"),
        ("case_id,slide_id,label\n1,2,\n", "line 2: expected a label"),
        ("case_id,slide_id,label\n", "only the header"),
        ("case_id,slide_id,label\n1,../x,a\n", "plain file name"),
        ("case_id,slide_id,label,mpp\n1,2,a,half\n", "found 'half'"),
        ("case_id,slide_id,label,mpp\n1,2,a,-1\n", "expected mpp"),
        ("", "comma-separated table .* found an empty file"),
        ("case_id,slide_id,label\n1,2\n", "line 2: expected a label"),
        ("case_id,slide_id,label\n1,2,a\n\n1,3,a,b\n", "line 4: expected 3 cells, found more"),
        ('case_id,slide_id,label\n1,2,"a\n', "comma-separated table"),
        ("case_id,slide,label\n1,2,a\n", "'slide_id' is missing, did you mean 'slide'"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read_labels(labels(tmp_path, text))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("P001,1,a\np001,2,b\n", "case_id P001 and p001 differ in capitals only"),
        ("1,S1,a\n2,s1,b\n", "slide_id S1 and s1 differ in capitals only"),
        ("1,1,nan\n2,2,b\n3,3,nan\n", "2 slides have the label 'nan'"),
        ("1,1,None\n2,2,b\n", "1 slides have the label 'None'"),
    ],
)
def test_what_is_probably_a_slip_is_said_once(
    tmp_path: Path, rows: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = labels(tmp_path, f"case_id,slide_id,label\n{rows}")
    with caplog.at_level("WARNING"):
        assert read_labels(path) == read_labels(path)
    (record,) = caplog.records
    assert expected in record.getMessage()


def test_table_from_a_spreadsheet(tmp_path: Path) -> None:
    """A byte order mark, carriage returns, blanks, quotes and empty lines change nothing; another
    encoding is refused.
    """
    path = tmp_path / "labels.csv"
    path.write_bytes('\ufeffcase_id, slide_id ,label\r\n\r\n1,"007"," a, b "\r\n\r\n'.encode())
    (record,) = read_labels(path)
    assert (record.case_id, record.slide_id, record.label) == ("1", "007", "a, b")
    path.write_bytes("case_id,slide_id,label\n1,2,ß\n".encode("latin-1"))
    with pytest.raises(UserError, match="comma-separated table .*can't decode"):
        read_labels(path)


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        read_labels(tmp_path / "labels.csv")


def test_classes_are_sorted_and_the_positive_one_is_last(tmp_path: Path) -> None:
    records = read_labels(labels(tmp_path, "case_id,slide_id,label\n1,1,POS\n2,2,NILM\n"))
    assert list_class_names(records) == ["NILM", "POS"]
    assert list_class_names(records, positive="NILM") == ["POS", "NILM"]
    with pytest.raises(UserError, match="expected one of the labels"):
        list_class_names(records, positive="pos.")
    with pytest.raises(UserError, match="at least two classes"):
        list_class_names(records[:1])


def test_slides_are_found_in_any_tree(tmp_path: Path) -> None:
    for name in (
        "a/S2.svs",
        "b/c/S1.tiff",
        "d/007/0_0.jpg",
        "d/007/0_1.jpg",
        "notes.txt",
        ".hidden.svs",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_slides(tmp_path).slides
    assert {slide_id: str(path.relative_to(tmp_path)) for slide_id, path in found.items()} == {
        "007": "d/007",
        "S1": "b/c/S1.tiff",
        "S2": "a/S2.svs",
    }


def test_ambiguous_and_unknown_slides_are_refused(tmp_path: Path) -> None:
    for name in ("a/S1.svs", "b/S1.tiff"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="expected one slide, found"):
        find_slides(tmp_path)
    (tmp_path / "b/S1.tiff").unlink()
    records = read_labels(labels(tmp_path, "case_id,slide_id,label\n1,S1,a\n2,S01,b\n"))
    assert "did you mean 'S1'" in locate_slides(records, tmp_path).problems["S01"]
    with pytest.raises(UserError, match="found none"):
        find_slides(tmp_path / "b")
    with pytest.raises(UserError, match="expected a folder"):
        find_slides(tmp_path / "nowhere")


def tree(root: Path, *names: str) -> dict[str, str]:
    """Make empty files and give what is found among them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return {
        slide_id: str(path.relative_to(root)) for slide_id, path in find_slides(root).slides.items()
    }


def test_compound_suffixes_and_dots_in_ids(tmp_path: Path) -> None:
    assert tree(tmp_path, "TCGA-01.f2.svs", "A.1.ome.tif", "B.OME.TIFF", "C.qptiff") == {
        "A.1": "A.1.ome.tif",
        "B": "B.OME.TIFF",
        "C": "C.qptiff",
        "TCGA-01.f2": "TCGA-01.f2.svs",
    }
    assert "A.1" not in tree(tmp_path, "deep/er/A.1.svs")
    assert "slide id 'A.1': expected one slide" in find_slides(tmp_path).problems["A.1"]


def test_pictures_count_when_nothing_else_is_there_or_when_asked_for(tmp_path: Path) -> None:
    assert tree(tmp_path, "a/P1.png", "P2.jpeg", "notes.txt") == {"P1": "a/P1.png", "P2": "P2.jpeg"}
    assert tree(tmp_path, "S1.svs") == {"S1": "S1.svs"}
    assert set(find_slides(tmp_path, pictures=True).slides) == {"P1", "P2", "S1"}


def test_folders_that_are_slides(tmp_path: Path) -> None:
    found = tree(
        tmp_path / "cohort",
        "T1/0_0.png",
        "T1/photo.png",
        "D1/1.dcm",
        "D1/2.dcm",
        "D2/x/only.dcm",
        "S1.svs",
    )
    assert found == {"D1": "D1", "S1": "S1.svs", "T1": "T1", "x": "D2/x"}
    # the folder or file itself
    assert find_slides(tmp_path / "cohort" / "T1").slides == {"T1": tmp_path / "cohort" / "T1"}
    assert find_slides(tmp_path / "cohort" / "D1").slides == {"D1": tmp_path / "cohort" / "D1"}
    assert find_slides(tmp_path / "cohort" / "S1.svs").slides == {
        "S1": tmp_path / "cohort" / "S1.svs"
    }
    assert tree(tmp_path / "cohort", "b1.dcm", "b2.dcm") == found
    problem = find_slides(tmp_path / "cohort").problems["cohort"]
    assert "a folder of its own for each DICOM series, found 2 files" in problem


@pytest.mark.parametrize("place", ["beside", "above"])
def test_a_picture_named_like_a_tile_hides_no_slide(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path if place == "beside" else tmp_path / "cohort"
    folder.mkdir(exist_ok=True)
    for name in ("a.svs", "b.svs"):
        (folder / name).touch()
    (tmp_path / "2024_11.jpg").touch()
    with caplog.at_level("WARNING"):
        assert list(find_slides(tmp_path).slides) == ["a", "b"]
    assert "2024_11.jpg" in caplog.text
    (folder / "tiles").mkdir()
    for name in ("0_0.jpg", "0_1.jpg"):
        (folder / "tiles" / name).touch()
    assert list(find_slides(tmp_path).slides) == ["a", "b", "tiles"], (
        "tile folders go on to be slides"
    )


def test_tile_folders_by_pattern(tmp_path: Path) -> None:
    tree(tmp_path, "T1/tile_x0_y0.png", "T2/tile_x9_y0.png")
    assert set(find_slides(tmp_path).slides) == {"tile_x0_y0", "tile_x9_y0"}, (
        "pictures, as no pattern says otherwise"
    )
    assert set(find_slides(tmp_path, "tile_x{x}_y{y}.png").slides) == {"T1", "T2"}


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    assert tree(tmp_path, "a/S1.svs") == {"S1": "a/S1.svs"}
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert set(find_slides(tmp_path).slides) == {"S1"}


def test_names_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="plain file name"):
        tree(tmp_path, "a\\..\\b.svs")


def test_a_labelled_picture_is_asked_for(tmp_path: Path) -> None:
    tree(tmp_path, "S1.svs", "S1.png", "P1.png", "a/P2.png", "b/P2.jpg")
    records = read_labels(labels(tmp_path, "case_id,slide_id,label\n1,S1,a\n2,P1,b\n"))
    assert locate_slides(records, tmp_path).slides == {
        "S1": tmp_path / "S1.svs",
        "P1": tmp_path / "P1.png",
    }
    records = read_labels(labels(tmp_path, "case_id,slide_id,label\n1,S1,a\n2,P2,b\n"))
    assert "expected one slide" in locate_slides(records, tmp_path).problems["P2"]
