"""Bags say which file they came from, coordinates of a slide of another size are refused, tiled
pictures are found again.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from patch_encoder import convert_coordinates, extract_features, filter_tiles, tile_slides
from patch_encoder.bags.bag import open_bag
from patch_encoder.extraction import bag_assembly as assembly
from patch_encoder.slides.names import END, compute_slide_identity
from patch_encoder.tiles.coordinates import read_coordinates
from tests.helpers import draw_slide, make_cohort, write_pyramid
from wsi_common.cli import run

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
    with h5py.File(root / "tiles" / "coords" / "S001.h5", "a") as file:
        del file["coords"].attrs["slide_fingerprint"]  # as in coordinates of other tools
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


def replace_slide(path: Path, seed: int = 9) -> None:
    """Another slide of the same size and of the same number of bytes."""
    size = path.stat().st_size
    write_pyramid(path, draw_slide(512, seed=seed))
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))


def test_a_slide_of_the_same_size_in_the_place_of_another_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_cohort(tmp_path, 2)
    slide, grid = root / "slides" / "S001.tiff", ["method=none", "target_mpp=null"]
    assert tile(root, *grid) == 0 and extract(root) == 0
    replace_slide(slide)
    assert tile(root, *grid) == 2
    assert "S001.h5: holds tiles of other settings or of another slide: slide_fingerprint" in (
        capsys.readouterr().err
    )
    assert extract(root) == 1, "its tiles are those of another slide"
    assert (
        "coordinates are of another file of that name: slide_fingerprint"
        in (failures(root)["S001"])
    )
    assert tile(root, *grid, "overwrite=true") == 0
    capsys.readouterr()
    assert extract(root) == 2, "the same corners, and other pixels"
    assert "S001.h5: holds features of another provenance: slide_fingerprint" in (
        capsys.readouterr().err
    )
    assert extract(root, "overwrite=true") == 0


def test_a_slide_that_was_moved_or_copied_stays_done(tmp_path: Path) -> None:
    root = make_cohort(tmp_path, 2)
    assert tile(root) == 0 and extract(root) == 0
    made = [
        *(root / "tiles" / "coords").iterdir(),
        *(root / "features" / "mean_colour" / "h5_files").iterdir(),
    ]
    before = {path: path.stat().st_mtime_ns for path in made}
    (root / "slides" / "deep" / "er").mkdir(parents=True)
    shutil.copyfile(root / "slides" / "S000.tiff", root / "slides" / "deep" / "S000.tiff")
    (root / "slides" / "S000.tiff").unlink()
    (root / "slides" / "S001.tiff").rename(root / "slides" / "deep" / "er" / "S001.tiff")
    assert tile(root) == 0 and extract(root) == 0
    assert len(before) == 4 and before == {path: path.stat().st_mtime_ns for path in made}


def test_tiles_that_were_filtered_or_converted_remember_their_slide(tmp_path: Path) -> None:
    root = make_cohort(tmp_path, 1)
    assert tile(root, "quality=true") == 0
    keys = [f"tiling={root}/tiles", f"output={root}/sharp", "min_blur=0"]
    assert run(filter_tiles.main, filter_tiles.Config, keys) == 0
    keys = [f"input={root}/tiles", f"slides={root}/slides", f"output={root}/ours", "to=ours"]
    assert run(convert_coordinates.main, convert_coordinates.Config, keys) == 0
    first = read_coordinates(root / "tiles" / "coords" / "S000.h5").slide_fingerprint
    assert len(first) == 64
    for name in ("sharp", "ours"):
        path = root / name / "coords" / "S000.h5"
        assert read_coordinates(path).slide_fingerprint == first
    replace_slide(root / "slides" / "S000.tiff")
    keys[2] = f"output={root}/other"
    assert run(convert_coordinates.main, convert_coordinates.Config, keys) == 1
