"""Splitting a COCO file: by lists, at random by groups, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection_kd.split_coco import Config, main
from wsi_common.cli import run


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Twelve images of four slides, two boxes each."""
    images = [
        {"id": 100 + i, "file_name": f"slide{i // 3}_{i}.jpg", "width": 8, "height": 8}
        for i in range(12)
    ]
    boxes = [
        {"id": i, "image_id": 100 + i // 2, "category_id": 7, "bbox": [0, 0, 2, 2]}
        for i in range(24)
    ]
    document = {
        "info": {"by": "us"},
        "images": images,
        "annotations": boxes,
        "categories": [{"id": 7, "name": "cell"}],
    }
    path = tmp_path / "all.json"
    path.write_text(json.dumps(document))
    return path


def read(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def lists(folder: Path, **names: list[str]) -> Path:
    folder.mkdir()
    for split, entries in names.items():
        (folder / f"{split}.txt").write_text("\n".join(entries) + "\n")
    return folder


def test_lists_decide(annotations: Path, tmp_path: Path) -> None:
    given = lists(tmp_path / "lists", train=["slide0_0", "slide1_3.jpg"], test=["slide3_11"])
    assert (
        run(
            main,
            Config,
            [f"annotations={annotations}", f"output={tmp_path / 'out'}", f"lists={given}"],
        )
        == 0
    )
    found = read(tmp_path / "out")
    assert {
        split: [image["id"] for image in document["images"]] for split, document in found.items()
    } == {
        "train": [100, 103],
        "test": [111],
    }
    assert [box["id"] for box in found["train"]["annotations"]] == [0, 1, 6, 7]
    assert found["test"]["categories"] == [{"id": 7, "name": "cell"}] and found["test"]["info"] == {
        "by": "us"
    }


def test_groups_stay_together_and_every_image_has_a_side(annotations: Path, tmp_path: Path) -> None:
    arguments = [f"annotations={annotations}", "shares=[0.5,0.25,0.25]", "group=^slide\\d+_"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(main, Config, [*arguments, f"output={tmp_path / name}", f"seed={seed}"]) == 0
    found = read(tmp_path / "a")
    slides = [
        {image["file_name"].partition("_")[0] for image in document["images"]}
        for document in found.values()
    ]
    assert sorted(map(len, slides)) == [1, 1, 2] and len(set.union(*slides)) == 4
    assert (
        len(found["train"]["images"]) == 6
        and sum(len(document["annotations"]) for document in found.values()) == 24
    )
    assert found == read(tmp_path / "b") and found != read(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shares=[0.5,0.2,0.2]", "expected three shares that sum to 1"),
        ("group=patient", "group='patient': does not match image 'slide0_0.jpg'"),
        ("group=^slide", "expected images in every split, found none for val and test, since"),
        ("lists=empty", "expected train.txt, val.txt or test.txt, found none"),
        ("lists=unknown", "'nobody' is not among the 12 images"),
        ("lists=twice", "'slide0_0' is in train.txt too"),
    ],
)
def test_what_cannot_be_split_is_one_line(
    change: str,
    message: str,
    annotations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    lists(tmp_path / "unknown", train=["nobody"])
    lists(tmp_path / "twice", train=["slide0_0"], val=["slide0_0"])
    assert (
        run(main, Config, [f"annotations={annotations}", f"output={tmp_path / 'out'}", change]) == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def split_names(tmp_path: Path, names: list[str], *lines: str) -> tuple[int, list[str]]:
    """The exit status, and the images of train.json, for a train.txt of these lines."""
    images = [{"id": i, "file_name": name, "width": 8, "height": 8} for i, name in enumerate(names)]
    document = {"images": images, "annotations": [], "categories": []}
    (tmp_path / "all.json").write_text(json.dumps(document))
    given = lists(tmp_path / "lists", train=list(lines))
    keys = [f"annotations={tmp_path}/all.json", f"output={tmp_path}/out", f"lists={given}"]
    status = run(main, Config, keys)
    found = read(tmp_path / "out").get("train", {"images": []})
    return status, [image["file_name"] for image in found["images"]]


def test_names_with_blanks_are_one_name_per_line(tmp_path: Path) -> None:
    names = ["case 1 a.jpg", "case", "1", "deep/case 2.jpg"]
    assert split_names(tmp_path, names, "case 1 a.jpg", "  case 2  ", "") == (
        0,
        ["case 1 a.jpg", "deep/case 2.jpg"],
    )


def test_equal_names_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    names = ["a/01.jpg", "b/01.jpg", "b/01.png", "b/02.png"]
    assert split_names(tmp_path, names, "b/01.jpg", "a/01", "02") == (
        0,
        ["a/01.jpg", "b/01.jpg", "b/02.png"],
    )


@pytest.mark.parametrize(("line", "number"), [("01", 3), ("01.jpg", 2), ("b/01", 2)])
def test_a_name_of_several_images_is_refused(
    tmp_path: Path, line: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = split_names(tmp_path, ["a/01.jpg", "b/01.jpg", "b/01.png"], line)
    assert (status, found) == (2, [])
    assert f"'{line}' may be {number} images" in capsys.readouterr().err
