"""The corpus: sub-datasets with `.npy` beside the slides, folders of coordinates, tile folders."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from patch_encoder import convert_coordinates
from patch_encoder.cohort.selection import Selection
from patch_encoder.slides.names import compute_fingerprint
from patch_encoder.tile_stream.plan import SHARD, TilePlan
from patch_encoder.tile_stream.sources import digest_sources, find_sources
from patch_encoder.tile_stream.stream_keys import StreamKeys
from patch_encoder.tiles.coordinates import read_coordinates
from tests.helpers import draw_slide, write_pyramid
from tests.patch_encoder.tile_stream.corpus import grid, make_tree, store
from wsi_common.cli import run
from wsi_common.errors import UserError


def find(root: Path, **keys: object) -> tuple[dict[str, tuple[str, int]], dict[str, str]]:
    """Name -> (sub-dataset, tiles), and what is wrong with the other slides."""
    problems: dict[str, str] = {}
    sources = find_sources(root, problems, **keys)  # type: ignore[arg-type]
    return {s.name: (s.subdataset, len(s.coordinates.coords)) for s in sources}, problems


def test_the_published_folder_is_read_as_it_is(tmp_path: Path) -> None:
    make_tree(tmp_path)
    deep = tmp_path / "C" / "batch 1" / "slide_1.tiff"
    write_pyramid(deep, draw_slide(256))
    np.save(deep.with_suffix(".npy"), grid(256, 256).astype(np.int32))
    found, problems = find(tmp_path)
    assert found == {
        "A/slide_1": ("A", 25),
        "A/slide_2": ("A", 25),
        "B/slide_1": ("B", 25),
        "B/slide_2": ("B", 25),
        "C/batch 1/slide_1": ("C/batch 1", 16),
    }
    assert not problems
    sources = find_sources(tmp_path / "A", {})
    assert [(s.name, s.subdataset) for s in sources] == [("slide_1", ""), ("slide_2", "")]
    geometry = sources[0].coordinates.geometry
    assert (geometry.patch_size_level0, geometry.target_size) == (256, 256), "256 px of level 0"
    assert sources[0].coordinates.coords.dtype == np.int32
    one = find_sources(tmp_path / "A" / "slide_1.tiff", {})
    assert [(s.name, s.subdataset) for s in one] == [("slide_1", "")]


def test_names_up_to_the_last_dot_and_files_of_other_tools_beside_the_slide(tmp_path: Path) -> None:
    first = write_pyramid(tmp_path / "case.1.ome.tif", draw_slide(512))
    np.save(tmp_path / "case.1.ome.npy", grid(512, 512))
    second = write_pyramid(tmp_path / "two.tiff", draw_slide(512))
    store(tmp_path, second, fingerprint=compute_fingerprint(second))
    third = write_pyramid(tmp_path / "three.tiff", draw_slide(512))
    with h5py.File(tmp_path / "three_patches.h5", "w") as file:
        dataset = file.create_dataset("coords", data=grid(512, 512, 128))
        dataset.attrs.update({"patch_size": 64, "patch_size_level0": 128, "overlap": 0})
        dataset.attrs.update({"level0_magnification": 40, "target_magnification": 20})
        dataset.attrs.update({"level0_width": 512, "level0_height": 512, "name": "three"})
    found, problems = find(tmp_path)
    assert found == {"case.1": ("", 64), "three": ("", 16), "two": ("", 64)} and not problems
    np.save(tmp_path / "two.npy", grid(512, 512))
    found, problems = find(tmp_path)
    assert list(found) == ["case.1", "three"]
    assert "expected one coordinates file beside it, found two.npy and two.h5" in problems["two"]
    assert first.is_file() and third.is_file()


def test_what_is_wrong_with_a_slide_is_listed_and_the_others_go_on(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "A" / "slide_2.npy").unlink()
    (tmp_path / "B" / "slide_1.npy").write_bytes(b"no array")
    np.save(tmp_path / "B" / "slide_2.npy", np.zeros((0, 2), np.int64))
    found, problems = find(tmp_path)
    assert list(found) == ["A/slide_1"]
    assert list(problems) == ["A/slide_2", "B/slide_1", "B/slide_2"]
    assert "expected coordinates beside it (<slide>.npy, <slide>.h5)" in problems["A/slide_2"]
    assert "cannot be read" in problems["B/slide_1"]
    assert "no tissue" in problems["B/slide_2"]
    assert not any("\n" in line for line in problems.values())


def test_coordinates_of_another_slide_are_refused_by_their_fingerprint(tmp_path: Path) -> None:
    for number in (1, 2):
        path = write_pyramid(tmp_path / "slides" / f"s{number}.tiff", draw_slide(512, seed=number))
        store(tmp_path / "coords", path, fingerprint=compute_fingerprint(path))
    found, problems = find(tmp_path / "slides", coords=str(tmp_path))
    assert list(found) == ["s1", "s2"] and not problems
    shutil.copy(tmp_path / "slides" / "s1.tiff", tmp_path / "slides" / "s2.tiff")
    found, problems = find(tmp_path / "slides", coords=str(tmp_path))
    assert list(found) == ["s1"]
    assert "its coordinates are of another file of that name" in problems["s2"]


def test_a_folder_of_coordinates_serves_a_tree_of_unique_names(tmp_path: Path) -> None:
    for sub, name in (("A", "s1"), ("B/deep", "s2"), ("B", "s3")):
        path = write_pyramid(tmp_path / "slides" / sub / f"{name}.tiff", draw_slide(512))
        store(tmp_path / "tiles" / "coords", path)
    (tmp_path / "tiles" / "coords" / "s3.h5").unlink()
    found, problems = find(tmp_path / "slides", coords=str(tmp_path / "tiles"))
    assert found == {"A/s1": ("A", 64), "B/deep/s2": ("B/deep", 64)}
    assert list(problems) == ["s3"]
    assert f"expected coordinates coords={tmp_path}/tiles, found none" in problems["s3"]
    for name in ("s1", "s2", "s3"):
        (tmp_path / "npy").mkdir(exist_ok=True)
        np.save(tmp_path / "npy" / f"{name}.npy", grid(512, 512))
    found, _ = find(tmp_path / "slides", coords=str(tmp_path / "npy"))
    assert list(found) == ["A/s1", "B/deep/s2", "B/s3"]
    write_pyramid(tmp_path / "slides" / "C" / "s1.tiff", draw_slide(512))
    found, problems = find(tmp_path / "slides", coords=str(tmp_path / "npy"))
    assert list(found) == ["B/deep/s2", "B/s3"]
    assert "slide id 's1': expected one slide, found" in problems["s1"]


def test_labels_and_lists_choose_the_slides(tmp_path: Path) -> None:
    make_tree(tmp_path / "slides", 2)
    (tmp_path / "slides" / "B" / "slide_1.tiff").rename(tmp_path / "slides" / "B" / "other.tiff")
    (tmp_path / "slides" / "B" / "slide_1.npy").rename(tmp_path / "slides" / "B" / "other.npy")
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label,mpp\nc,other,x,0.3\nd,gone,x,\n")
    problems: dict[str, str] = {}
    sources = find_sources(
        tmp_path / "slides", problems, labels=str(tmp_path / "labels.csv"), need_mpp=True
    )
    assert [(s.name, s.mpp) for s in sources] == [("B/other", 0.3)], "labels.csv wins"
    assert "in labels.csv, but not below" in problems["gone"]
    listed = Selection({"slide_1": frozenset()})
    assert list(find(tmp_path / "slides", selection=listed)[0]) == ["A/slide_1"]


def test_a_tile_folder_without_coordinates_is_taken_tile_by_tile(
    tmp_path: Path, tile_folder: Path
) -> None:
    sources = find_sources(tile_folder.parent, {})
    assert [(s.name, len(s.coordinates.coords)) for s in sources] == [("007", 5)]
    assert sources[0].coordinates.geometry.patch_size_level0 == 64
    np.save(tile_folder.parent / "007.npy", np.array([[0, 0]]))
    assert len(find_sources(tile_folder.parent, {})[0].coordinates.coords) == 1
    named = tmp_path / "named" / "s1"
    named.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(named / "t_x0_y0.png")
    Image.new("RGB", (32, 32)).save(named / "t_x40_y0.png")
    found = find_sources(named.parent, {}, tile_pattern="t_x{x}_y{y}.png")
    assert found[0].coordinates.coords.tolist() == [[0, 0], [40, 0]]
    assert found[0].coordinates.geometry.tile_pattern == "t_x{x}_y{y}.png"


def test_a_picture_without_coordinates_is_one_tile_and_a_slide_is_not(tmp_path: Path) -> None:
    for kind, size in (("flat", (60, 40)), ("tall", (33, 64)), ("slide", (5000, 16))):
        (tmp_path / kind).mkdir()
        Image.new("RGB", size).save(tmp_path / kind / "1.png")
    write_pyramid(tmp_path / "flat" / "2.tiff", draw_slide(1024))
    Image.new("RGB", (48, 48)).save(tmp_path / "flat" / "3.tif")
    problems: dict[str, str] = {}
    sources = find_sources(tmp_path, problems, pictures=True)
    assert {s.name: (s.coordinates.coords.tolist(), s.coordinates.geometry.patch_size_level0)
            for s in sources} == {
        "flat/1": ([[10, 0]], 40), "flat/3": ([[0, 0]], 48), "tall/1": ([[0, 15]], 33),
    }  # fmt: skip
    assert sorted(problems) == ["flat/2", "slide/1"]
    np.save(tmp_path / "flat" / "3.npy", np.array([[0, 0]]))  # where one has corners, all need them
    names = [s.name for s in find_sources(tmp_path, problems, pictures=True)]
    assert names == ["flat/3", "tall/1"]
    assert sorted(problems) == ["flat/1", "flat/2", "slide/1"]
    assert all("expected coordinates" in reason for reason in problems.values())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_the_resolution_is_read_where_it_is_needed(tmp_path: Path, workers: int) -> None:
    make_tree(tmp_path, 2)
    make_tree(tmp_path / "unknown", 1, mpp=None)
    (tmp_path / "A" / "broken.svs").write_bytes(b"no slide")
    np.save(tmp_path / "A" / "broken.npy", grid(512, 512))
    assert find_sources(tmp_path, {})[0].mpp is None, "no file is opened without need"
    problems: dict[str, str] = {}
    sources = find_sources(tmp_path, problems, need_mpp=True, workers=workers, timeout=60.0)
    assert {s.name: s.mpp for s in sources} == {"A/slide_1": 0.5, "B/slide_1": 0.5}
    assert list(problems) == ["A/broken", "unknown/A/slide_1"]
    assert "expected its resolution in um per pixel for mpps=..." in problems["unknown/A/slide_1"]
    assert "mpp column of labels.csv" in problems["unknown/A/slide_1"]
    given = find_sources(tmp_path / "unknown", {}, mpp=0.25, need_mpp=True)
    assert given[0].mpp == 0.25


def test_a_corpus_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected slides \(\.bif .*found none$"):
        find_sources(tmp_path / "empty", {})
    write_pyramid(tmp_path / "slides" / "s1.tiff", draw_slide(512), mpp=None)
    beside = (
        r"expected slides with coordinates, found none of 1; 's1': slide .* beside it \(<slide>"
    )
    with pytest.raises(UserError, match=beside):
        find_sources(tmp_path / "slides", {})
    with pytest.raises(UserError, match=r"coords=.*: expected coordinates \(\*\.h5, \*\.npy\)"):
        find_sources(tmp_path / "slides", {}, coords=str(tmp_path / "empty"))
    np.save(tmp_path / "slides" / "s1.npy", grid(512, 512))
    with pytest.raises(UserError, match=r"mpps=.*: expected slides of known resolution, found non"):
        find_sources(tmp_path / "slides", {}, need_mpp=True)


def test_the_digest_is_of_all_that_a_resumed_run_relies_on(tmp_path: Path) -> None:
    make_tree(tmp_path)
    sources = find_sources(tmp_path, {})
    digest = digest_sources(sources)
    assert digest_sources(find_sources(tmp_path, {})) == digest
    np.save(tmp_path / "A" / "slide_1.npy", grid(512, 512)[1:])
    moved = digest_sources(find_sources(tmp_path, {}))
    other = digest_sources([replace(sources[0], mpp=0.3), *sources[1:]])
    assert len({digest, moved, other, digest_sources(sources[1:])}) == 4


def test_convert_coordinates_reads_the_tree(tmp_path: Path) -> None:
    make_tree(tmp_path / "data", 2)
    (tmp_path / "data" / "B" / "slide_1.tiff").rename(tmp_path / "data" / "B" / "slide_3.tiff")
    (tmp_path / "data" / "B" / "slide_1.npy").rename(tmp_path / "data" / "B" / "slide_3.npy")
    keys = [
        f"input={tmp_path}/data",
        f"slides={tmp_path}/data",
        f"output={tmp_path}/out",
        "to=ours",
    ]

    def convert(*extra: str) -> int:
        return run(convert_coordinates.main, convert_coordinates.Config, [*keys, *extra])

    assert convert("tile_size=64") == 0
    names = sorted(path.name for path in (tmp_path / "out" / "coords").iterdir())
    assert names == ["slide_1.h5", "slide_3.h5"]
    coordinates = read_coordinates(tmp_path / "out" / "coords" / "slide_3.h5")
    assert len(coordinates.coords) == 25 and coordinates.geometry.mpp == 0.5
    np.save(tmp_path / "data" / "B" / "slide_1.npy", grid(64, 64))
    assert convert("tile_size=64") == 1
    with (tmp_path / "out" / "failures.csv").open(newline="") as stream:
        failures = {row["slide"]: row["error"] for row in csv.DictReader(stream)}
    assert (
        list(failures) == ["slide_1"]
        and "convert each sub-dataset by itself" in failures["slide_1"]
    )


def test_the_keys_say_what_is_found_and_how_it_is_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tree(tmp_path / "data", 2)
    make_tree(tmp_path / "data" / "coarse", 1, mpp=1.0)
    keys = StreamKeys(
        slides=f"{tmp_path}/data",
        tile_size=32,
        balance="slides",
        mpps=[0.5, 2.0],
        mpp_weights=[1.0, 3.0],
        jitter=0.0,
        tissue_share=0.0,
        open_slides=3,
        tiles_per_visit=5,
        cache_dir=f"{tmp_path}/cache",
    )
    caplog.set_level("INFO")
    problems: dict[str, str] = {}
    sources = keys.find(problems, 0)
    plan = keys.plan(sources, 7)
    assert not problems and [source.mpp for source in sources] == [0.5, 0.5, 1.0]
    assert plan == TilePlan(
        sources, 7, 32, "slides", (0.5, 2.0), (1.0, 3.0), 0.0, 0.0, 3, 5, shard=SHARD
    )
    assert "1 of 3 slides are too coarse for 0.5 um per px and left out of it" in caplog.text
    assert StreamKeys(slides="x").plan(sources, 0) == TilePlan(sources, 0, 256)
