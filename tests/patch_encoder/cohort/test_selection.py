"""A cohort with something wrong in it goes on with the rest; slide lists and endings choose."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from patch_encoder import convert_coordinates, inspect_slides, tile_slides
from patch_encoder.cohort.selection import Selection, read_selection
from patch_encoder.cohort.slide_files import find_cohort, find_slides
from tests.helpers import draw_slide, make_cohort, write_pyramid
from tests.patch_encoder.extraction.conftest import TISSUE, extract
from wsi_common.cli import run
from wsi_common.errors import UserError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def listed(folder: Path) -> dict[str, str]:
    """Slide -> error of a failures.csv; empty where there is none."""
    path = folder / "failures.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["slide"]: row["error"] for row in csv.DictReader(stream)}


def tile(root: Path, *extra: str) -> int:
    places = [f"slides={root}/slides", f"output={root}/tiles", "tile_size=64", "workers=0"]
    return run(tile_slides.main, tile_slides.Config, [*places, *TISSUE, *extra])


def test_each_fault_of_a_tree_is_named_and_the_rest_is_found(tmp_path: Path) -> None:
    touch(tmp_path, "a/S1.svs", "b/S1.tiff", "b/S2.tiff", "c/x\ny.svs", "d/1.dcm", "d/2.dcm")
    touch(tmp_path, "d/S3.svs", "e/\udce9.svs")
    found = find_slides(tmp_path)
    assert list(found.slides) == ["S2", "S3"]
    reasons = {
        "S1": "expected one slide, found .*S1.svs and .*S1.tiff; rename one",
        "x\\ny": "plain file name without .* line breaks",
        "d": "a folder of its own for each DICOM series, found 2 files",
        "\\udce9": "expected a name in UTF-8",
    }
    assert found.problems.keys() == reasons.keys()
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            raise UserError(found.problems[name])
    table = write(
        tmp_path / "labels.csv", "case_id,slide_id,label\n1,S2,a\n2,S1,a\n3,S02,b\n4,S3.SVS,b\n"
    )
    cohort = find_cohort(tmp_path, table)
    assert list(cohort.slides) == ["S2", "S3"], "an ending in labels.csv is no part of the id"
    assert cohort.problems.keys() == {"S1", "S02"}, "what is not labelled is no matter"
    assert "in labels.csv, but not below" in cohort.problems["S02"]
    assert "did you mean 'S2'?" in cohort.problems["S02"]


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/S1.svs", "b/S1.tiff")
    with pytest.raises(UserError, match="S1.*expected one slide"):
        find_slides(tmp_path)
    table = write(tmp_path / "labels.csv", "case_id,slide_id,label\n1,S7,a\n")
    (tmp_path / "b/S1.tiff").unlink()
    with pytest.raises(UserError, match="none of the 1 there; .S7"):
        find_cohort(tmp_path, table)


@pytest.mark.parametrize(
    "text",
    [
        "S1\n\n  b/S2.tiff \n# a remark\nS9\n",
        "label,slide_id\r\nx,S1\r\ny,S2\r\nz,S9\r\n",
        "slide_id\nS1.svs\nS2\nS9\n",
    ],
)
def test_a_list_chooses_slides(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "a/S1.svs", "b/S2.tiff", "b/S3.tiff")
    chosen = read_selection(write(tmp_path / "list.txt", "\ufeff" + text), [])
    found = find_cohort(tmp_path, "", chosen)
    assert list(found.slides) == ["S1", "S2"]
    assert found.problems.keys() == {"S9"} and "in slides_list, but not" in found.problems["S9"]
    table = write(tmp_path / "labels.csv", "case_id,slide_id,label\n1,S1,a\n2,S3,b\n")
    found = find_cohort(tmp_path, table, chosen)
    assert list(found.slides) == ["S1"]
    assert found.problems.keys() == {"S2", "S9"}
    assert "not in labels.csv" in found.problems["S2"]


def test_a_file_name_in_a_list_or_an_ending_decides_between_two(tmp_path: Path) -> None:
    touch(tmp_path, "S1.svs", "S1.ndpi", "S2.svs", "S1.png", "T/0_0.png", "T/0_1.png", "D/1.dcm")
    chosen = read_selection(write(tmp_path / "list.txt", "S1.ndpi\nS2\n"), [])
    assert find_slides(tmp_path, selection=chosen).slides == {
        "S1": tmp_path / "S1.ndpi",
        "S2": tmp_path / "S2.svs",
    }
    for endings, expected in (
        ([".svs"], {"S1": "S1.svs", "S2": "S2.svs"}),
        (["NDPI"], {"S1": "S1.ndpi"}),
        ([".dcm"], {"D": "D"}),
        ([".png"], {"S1": "S1.png"}),
    ):
        found = find_slides(tmp_path, selection=read_selection("", endings))
        assert found.slides == {name: tmp_path / path for name, path in expected.items()}
        assert not found.problems


def test_selections_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="suffixes: expected endings of slides .* did you mean"):
        read_selection("", [".sv"])
    with pytest.raises(UserError, match="expected one slide id or file name per line, found none"):
        read_selection(write(tmp_path / "list.txt", "\n# nobody\n"), [])
    (tmp_path / "list.txt").write_bytes(b"S\xff1\n")
    with pytest.raises(UserError, match="list.txt: expected .* UTF-8"):
        read_selection(str(tmp_path / "list.txt"), [])
    assert read_selection("", []) == Selection()


def test_every_stage_goes_on_without_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_cohort(tmp_path)
    write_pyramid(root / "slides" / "b" / "S001.tiff", draw_slide(128))
    table = f"labels={root}/labels.csv"
    with (root / "labels.csv").open("a") as stream:
        stream.write("C9,S009,positive\n")
    assert tile(root, table) == 1
    assert listed(root / "tiles").keys() == {"S001", "S009"}
    assert len((root / "tiles" / "tiling.csv").read_text().splitlines()) == 3
    assert extract(root, table) == 1
    assert listed(root / "features" / "mean_colour").keys() == {"S001", "S009"}
    keys = [f"slides={root}/slides", table, "tile_size=64", "workers=0", "sample=1"]
    capsys.readouterr()
    assert run(inspect_slides.main, inspect_slides.Config, keys) == 1
    printed = capsys.readouterr().out
    assert "S009: in labels.csv, but not below" in printed and "S000" in printed
    keys = [f"slides={root}/slides", f"input={root}/tiles", f"output={root}/clam", "to=clam"]
    assert run(convert_coordinates.main, convert_coordinates.Config, keys) == 0
    (root / "slides" / "b" / "S001.tiff").unlink()
    write_pyramid(root / "slides" / "b" / "S000.tiff", draw_slide(128))
    keys[2] = f"output={root}/clam2"
    assert run(convert_coordinates.main, convert_coordinates.Config, keys) == 1
    assert "expected one slide" in listed(root / "clam2")["S000"]


def test_every_stage_takes_a_list_and_endings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_cohort(tmp_path)
    write_pyramid(root / "slides" / "S000.tif", draw_slide(512))  # as S000.tiff
    names = write(root / "list.csv", "slide_id\nS000\nS002.tiff\n")
    some = [f"slides_list={names}", "suffixes=[.tiff]"]
    assert tile(root, *some) == 0
    assert sorted(path.stem for path in (root / "tiles" / "coords").iterdir()) == ["S000", "S002"]
    assert tile(root, "suffixes=[.tiff]") == 0, "finished slides stay finished"
    assert extract(root, *some) == 0
    bags = (root / "features" / "mean_colour" / "h5_files").iterdir()
    assert sorted(path.stem for path in bags) == ["S000", "S002"]
    keys = [f"slides={root}/slides", "tile_size=64", "workers=0", "sample=0", "json=true", *some]
    capsys.readouterr()
    assert run(inspect_slides.main, inspect_slides.Config, keys) == 0
    printed = capsys.readouterr().out
    assert "S000.tiff" in printed and "S002.tiff" in printed and "S001" not in printed
    keys = [f"slides={root}/slides", f"input={root}/tiles", f"output={root}/clam", "to=clam"]
    assert run(convert_coordinates.main, convert_coordinates.Config, [*keys, *some]) == 0
    assert len(list((root / "clam" / "patches").iterdir())) == 2
