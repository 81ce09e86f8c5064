"""Bags say which file they came from, coordinates of a slide of another size are refused, tiled
pictures are found again.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import run
from patch_encoder import extract_features, tile_slides
from patch_encoder.bags.bag import open_bag
from patch_encoder.extraction import bag_assembly as assembly
from patch_encoder.slides.names import END, compute_slide_identity
from tests.helpers import draw_slide, make_cohort, write_pyramid

TILING = [
    "tile_size=64",
    "tissue.mpp=2",
    "tissue.median=4",
    "tissue.closing=4",
    "tissue.min_area=50",
    "workers=0",
]


def tile(root: Path, *extra: str) -> int:
    return run(
        tile_slides.main,
        tile_slides.Config,
        [f"slides={root}/slides", f"output={root}/tiles", *TILING, *extra],
    )


def extract(root: Path, *extra: str) -> int:
    base = [
        f"slides={root}/slides",
        f"coords={root}/tiles",
        f"output={root}/features",
        "encoder=mean_colour",
    ]
    return run(
        extract_features.main,
        extract_features.Config,
        [*base, "device=cpu", "precision=fp32", "workers=0", *extra],
    )


def failures(root: Path) -> dict[str, str]:
    with (root / "features" / "mean_colour" / "failures.csv").open(newline="") as stream:
        return {row["slide"]: row["error"] for row in csv.DictReader(stream)}


def header(root: Path, slide: str) -> dict[str, object]:
    return open_bag(root / "features" / "mean_colour" / "h5_files" / f"{slide}.h5").attributes


def test_a_bag_says_which_file_it_came_from(tmp_path: Path) -> None:
    root = make_cohort(tmp_path, 1)
    assert tile(root) == 0 and extract(root) == 0
    data, found = (root / "slides" / "S000.tiff").read_bytes(), header(root, "S000")
    assert (found["slide_file"], found["slide_bytes"]) == ("S000.tiff", len(data))
    assert (
        found["slide_fingerprint"]
        == hashlib.sha256(str(len(data)).encode() + data[:END] + data[-END:]).hexdigest()
    )
    assert (found["level0_width"], found["level0_height"]) == (512, 512)


def test_the_fingerprint_sees_both_ends_the_size_and_the_files_of_a_folder(tmp_path: Path) -> None:
    data = bytearray(np.random.default_rng(0).bytes(3 * END))
    file = tmp_path / "a.svs"
    prints = set()
    for change in (None, 0, len(data) - 1):
        if change is not None:
            data[change] ^= 255
        file.write_bytes(data)
        prints.add(compute_slide_identity(file)["slide_fingerprint"])
    file.write_bytes(data + data[-END:])
    prints.add(compute_slide_identity(file)["slide_fingerprint"])
    assert len(prints) == 4
    folder = tmp_path / "folder"
    for name in ("0_1.png", "0_0.png"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"12345")
    found = compute_slide_identity(folder)
    assert (found["slide_file"], found["slide_bytes"]) == ("folder", 10)
    assert found["slide_fingerprint"] == hashlib.sha256(b"0_0.png 5\n0_1.png 5\n").hexdigest()
    (tmp_path / "empty").touch()
    assert compute_slide_identity(tmp_path / "empty")["slide_bytes"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_swapped_slide_is_refused_with_one_line(tmp_path: Path, workers: int) -> None:
    root = make_cohort(tmp_path, 2)
    assert tile(root) == 0
    write_pyramid(root / "slides" / "S001.tiff", draw_slide(640, seed=1))
    assert extract(root, f"workers={workers}") == 1
    (row,) = failures(root).items()
    assert row[0] == "S001" and "\n" not in row[1]
    assert (
        "expected 512 x 512 px as when it was tiled, found 640 x 640: another slide of that name; "
        "tile it again" in row[1]
    )
    assert header(root, "S000")["slide_file"] == "S000.tiff"


def test_a_slide_that_goes_away_at_the_end_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_cohort(tmp_path, 2)
    assert tile(root) == 0

    def gone(path: Path) -> dict[str, str | int]:
        if path.name == "S000.tiff":
            os.stat(path.with_name("nothing"))
        return compute_slide_identity(path)

    monkeypatch.setattr(assembly, "compute_slide_identity", gone)
    assert extract(root) == 1
    assert list(failures(root)) == ["S000"] and "No such file" in failures(root)["S000"]
    assert [path.name for path in (root / "features" / "mean_colour" / "h5_files").iterdir()] == [
        "S001.h5"
    ]


def test_pictures_that_were_tiled_between_slides_are_encoded_without_labels(tmp_path: Path) -> None:
    root = make_cohort(tmp_path, 1)
    Image.fromarray(draw_slide(512, seed=4)).save(root / "slides" / "P001.png")
    assert tile(root, "pictures=true", "mpp=0.5") == 0
    shutil.copy(
        root / "slides" / "P001.png", root / "slides" / "overview.png"
    )  # never tiled: no slide
    assert extract(root) == 0
    assert (
        header(root, "P001")["slide_file"] == "P001.png"
        and header(root, "S000")["slide_file"] == "S000.tiff"
    )
    assert len(list((root / "features" / "mean_colour" / "h5_files").iterdir())) == 2
