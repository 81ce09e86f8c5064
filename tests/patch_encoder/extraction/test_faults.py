"""Extraction that is disturbed: unreadable tiles, killed processes, a full disk, a neighbour on the
same output.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from patch_encoder import tile_slides
from patch_encoder.bags import writer as bags
from patch_encoder.bags.bag import open_bag, read_bag
from patch_encoder.bags.paths import list_bags
from patch_encoder.bags.writer import BagWriter, write_bag
from patch_encoder.cohort import disk_space
from patch_encoder.cohort import tiling as tiling_loop
from patch_encoder.extraction import loop as engine
from patch_encoder.models.encoders import Encoder, build_encoder
from patch_encoder.models.transforms import ToInputSize
from patch_encoder.slides import RegionError, open_slide
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry, write_coordinates
from tests.helpers import forget_slides, kill_when
from tests.patch_encoder.extraction.conftest import arguments, extract
from wsi_common.cli import run


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


def as_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "h5_files").iterdir())}


@pytest.fixture
def holes(tile_folder: Path, tmp_path: Path) -> Path:
    """A tile folder of five tiles, the second and the fourth of which do not decode, beside a whole
    one of one tile.
    """
    other = tile_folder.parent / "008"
    other.mkdir()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(other / "0_0.png")
    tiling = [
        f"slides={tmp_path}/slides",
        f"output={tmp_path}/tiles",
        "tile_size=64",
        "target_mpp=null",
        "workers=1",
    ]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 0
    forget_slides(tmp_path / "tiles")
    for name in ("0_1.png", "2_0.png"):
        (tile_folder / name).write_bytes(b"broken")
    return tmp_path


def test_unreadable_tiles_are_counted_and_a_limit_decides(
    holes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = holes / "features" / "mean_colour"
    assert extract(holes, "max_bad_tiles=0.39") == 1
    assert (
        "2 of 5 tiles cannot be read (max_bad_tiles=0.39)" in (folder / "failures.csv").read_text()
    )
    assert list(list_bags(folder)) == ["008"]
    assert extract(holes, "max_bad_tiles=0.4", "workers=2", "batch_size=2", "pt=true") == 0
    bag = read_bag(folder / "h5_files" / "007.h5")
    assert bag.attributes["unreadable_tiles"] == 2
    # tile (r, c) is 40 r + 20 c + 20 grey: rows and corners still belong together
    assert np.allclose(bag.features[:, 0] * 255, [20, 60, 120], atol=0.5)
    assert bag.coords is not None and bag.coords.tolist() == [[0, 0], [0, 64], [64, 128]]
    assert len(read_bag(folder / "pt_files" / "007.pt").features) == 3
    assert "unreadable_tiles" not in read_bag(folder / "h5_files" / "008.h5").attributes
    # done under this limit, not under a stricter one
    before = (folder / "h5_files" / "007.h5").stat().st_mtime_ns
    assert extract(holes, "max_bad_tiles=0.5") == 0
    assert (folder / "h5_files" / "007.h5").stat().st_mtime_ns == before
    assert extract(holes) == 2
    assert "found 2 of 5 that could not be read" in capsys.readouterr().err
    assert extract(holes, "max_bad_tiles=1.5") == 2


def test_a_slide_without_any_readable_tile_fails_whatever_the_limit(holes: Path) -> None:
    for path in (holes / "slides" / "007").iterdir():
        path.write_bytes(b"broken")
    assert extract(holes, "max_bad_tiles=1") == 1
    assert "5 of 5 tiles" in (holes / "features" / "mean_colour" / "failures.csv").read_text()


def test_real_slide_with_a_damaged_middle(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    path = tmp_path / "slides" / "hole.svs"
    shutil.copy(real_data / "wsi_broken" / "DERIVED-cmu-1-small-region.zerotail.svs", path)
    grid = np.stack(np.meshgrid(np.arange(0, 1984, 240), np.arange(0, 2640, 240)), -1).reshape(
        -1, 2
    )
    geometry = TileGeometry("hole", 240, 240, 0, 240, 0.499, 0.499, 0.0, 2220, 2967)
    write_coordinates(tmp_path / "tiles" / "coords" / "hole.h5", Coordinates(grid, geometry))
    # every tile with a handle of its own, so that no error can spread
    readable = []
    for x, y in grid.tolist():
        # a tile of the damaged middle is refused and not listed; how many are is asked below
        with suppress(RegionError), open_slide(path) as slide:
            slide.read(x, y, 240)
            readable.append([x, y])
    bad = len(grid) - len(readable)
    assert 0 < bad < len(grid)
    folder = tmp_path / "features" / "mean_colour"
    assert extract(tmp_path) == 1
    assert f"{bad} of {len(grid)} tiles cannot be read" in (folder / "failures.csv").read_text()
    assert extract(tmp_path, "max_bad_tiles=0.9", "workers=2") == 0
    bag = read_bag(folder / "h5_files" / "hole.h5")
    assert bag.coords is not None and bag.coords.tolist() == readable
    assert not (folder / "failures.csv").exists()


def test_features_that_no_network_computes_are_the_same_on_any_device(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(cohort, "precision=bf16") == 0
    assert extract(cohort, "precision=fp32") == 0, "nothing is left to do"
    bag = open_bag(cohort / "features" / "mean_colour" / "h5_files" / "S000.h5")
    assert bag.attributes["precision"] == "fp32"


def test_a_place_that_cannot_be_written_is_one_line_before_any_work(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read-only file system by its error: the rights of a folder do not stop root."""
    opened, real = [], os.open

    def read_only(path: str | Path, flags: int, *mode: int, **options: int) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(cohort)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(engine, "encode_slides", lambda *_, **__: opened.append("bags"))
    monkeypatch.setattr(tiling_loop, "tile_all", lambda *_: opened.append("tiles") or [])
    assert extract(cohort) == 2
    tiling = [f"slides={cohort}/slides", f"output={cohort}/again"]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 2 and all("Read-only file system" in line for line in lines)
    assert not opened


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fills_while_tiling_is_one_line_and_the_end(
    cohort: Path, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(tiling_loop, "write_tiles", full)
    tiling = [f"slides={cohort}/slides", f"output={cohort}/again", f"workers={workers}"]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error") and "No space left on device" in error
    assert not (cohort / "again" / "failures.csv").exists(), "it is not for the slides"


def test_a_name_that_is_not_utf8_and_a_long_one_are_listed_with_the_others(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (cohort / "slides" / "S000.tiff").read_bytes()
    (cohort / "slides" / os.fsdecode(b"S\xff9.tiff")).write_bytes(whole)
    (cohort / "slides" / ("L" * 230 + ".tiff")).write_bytes(whole)
    (cohort / "slides" / "S001.tiff").write_bytes(whole[:3000])
    tiling = [f"slides={cohort}/slides", f"output={cohort}/again", "tile_size=64", "workers=1"]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 1
    listed = (cohort / "again" / "failures.csv").read_text()
    assert "S001," in listed and "S\\udcff9," in listed and listed.count("\n") == 3
    assert (cohort / "again" / "coords" / ("L" * 230 + ".h5")).is_file()
    assert extract(cohort, f"coords={cohort}/again") == 1
    listed = (cohort / "features" / "mean_colour" / "failures.csv").read_text()
    assert "S001," in listed and "S\\udcff9," in listed


@pytest.mark.parametrize("damage", ["cut", "empty", "group", "pt"])
def test_a_damaged_bag_is_extracted_again_and_stops_nothing(
    cohort: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert extract(cohort, "pt=true") == 0
    folder = cohort / "features" / "mean_colour"
    before = as_bytes(folder)
    others = {name: (folder / "h5_files" / name).stat().st_mtime_ns for name in before}
    bag = folder / "h5_files" / "S001.h5"
    if damage == "group":
        with h5py.File(bag, "w") as file:
            file.create_group("features")
    elif damage == "pt":
        pt = folder / "pt_files" / "S001.pt"
        pt.write_bytes(pt.read_bytes()[:100])
    else:
        bag.write_bytes(before["S001.h5"][: 900 if damage == "cut" else 0])
    assert extract(cohort, "pt=true") == 0
    assert "it is made anew" in caplog.text and "S001" in caplog.text
    assert as_bytes(folder) == before
    assert len(read_bag(folder / "pt_files" / "S001.pt")) == len(read_bag(bag))
    for name in ("S000.h5", "S002.h5"):
        assert (folder / "h5_files" / name).stat().st_mtime_ns == others[name], "left alone"


@pytest.mark.process
def test_killed_in_the_middle_and_started_again_gives_the_same_files(cohort: Path) -> None:
    command = arguments(cohort, "encoder=stain_texture", "batch_size=2")
    part = cohort / "features" / "stain_texture" / "h5_files"
    kill_when(
        lambda: (part / "S000.h5").exists() and bool(hidden(part)),
        "patch_encoder.extract_features",
        command,
    )  # a slide is done, the next one is under way
    assert hidden(part), "what was under way has a hidden name"
    for file in hidden(part):
        os.utime(file, (1.0, 1.0))  # as if the second start came later
    for file in part.glob("*.h5"):
        read_bag(file)
    assert extract(cohort, "encoder=stain_texture", "batch_size=2") == 0
    assert extract(cohort, "encoder=stain_texture", "batch_size=5", f"output={cohort}/clean") == 0
    assert as_bytes(part.parent) == as_bytes(cohort / "clean" / "stain_texture")
    assert not hidden(cohort / "features"), "the orphan is gone"


@pytest.mark.process
def test_two_processes_on_one_output_do_each_other_no_harm(
    cohort: Path, root: Path, warm_python: Path
) -> None:
    command = [
        warm_python,
        "-m",
        "patch_encoder.extract_features",
        *arguments(cohort, "batch_size=1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in pair:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert extract(cohort, f"output={cohort}/alone") == 0
    assert as_bytes(cohort / "features" / "mean_colour") == as_bytes(
        cohort / "alone" / "mean_colour"
    )
    assert not hidden(cohort / "features")


def test_room_is_checked_before_any_slide_is_read(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = disk_space.estimate_bag_bytes(66, 3, "float32", pt=False)
    assert needed == 66 * (3 * 4 + 16) + 65536
    assert (
        disk_space.estimate_bag_bytes(66, 3, "float16", pt=True)
        == 66 * 3 * 2 * 2 + 66 * 16 + 2 * 65536
    )
    tiles = sum(len(read_coords(cohort, slide)) for slide in ("S000", "S001", "S002"))
    whole = tiles * 28 + 3 * 65536
    free = {"bytes": whole - 1}
    monkeypatch.setattr(
        disk_space.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, free["bytes"])
    )
    assert extract(cohort) == 2
    error = capsys.readouterr().err
    assert (
        "KiB free for the features of 3 slides" in error
        and "dtype=float16" in error
        and error.count("\n") == 1
    )
    assert not (cohort / "features").exists()
    free["bytes"] = whole
    assert extract(cohort) == 0
    free["bytes"] = 0
    assert extract(cohort) == 0, "nothing is left to do"


def read_coords(root: Path, slide: str) -> np.ndarray:
    with h5py.File(root / "tiles" / "coords" / f"{slide}.h5") as file:
        return file["coords"][()]


def test_disk_that_fills_on_the_way_leaves_whole_bags_and_the_run_goes_on(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reserve, calls = bags.reserve, []

    def full(path: Path, size: int) -> None:
        calls.append(path)
        if "S001" in path.name:
            path.write_bytes(b"")
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(path, size)

    monkeypatch.setattr(bags, "reserve", full)
    assert extract(cohort) == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error and "start again" in error and error.count("\n") == 1
    folder = cohort / "features" / "mean_colour"
    assert list(list_bags(folder)) == ["S000"] and not hidden(folder)
    monkeypatch.setattr(bags, "reserve", reserve)
    assert extract(cohort) == 0
    assert extract(cohort, f"output={cohort}/clean") == 0
    assert as_bytes(folder) == as_bytes(cohort / "clean" / "mean_colour")


def test_a_bag_takes_its_room_before_the_first_row(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    corners = np.arange(2000).reshape(-1, 2)
    writer = BagWriter(tmp_path / "a.h5", (1000, 64), "float32")
    (temporary,) = hidden(tmp_path)
    assert temporary.stat().st_blocks * 512 >= features.nbytes + corners.nbytes
    for start in range(0, 1000, 130):
        writer.append(features[start : start + 130])
    writer.finish(corners, {"patch_size": 64}, {"encoder": "x"})
    write_bag(tmp_path / "b.h5", features, corners, {"patch_size": 64}, {"encoder": "x"})
    assert open_bag(tmp_path / "a.h5").digest() == open_bag(tmp_path / "b.h5").digest()
    assert np.array_equal(read_bag(tmp_path / "a.h5").features, features)
    assert (tmp_path / "a.h5").stat().st_size < features.nbytes + corners.nbytes + bags.BAG_OVERHEAD
    assert not hidden(tmp_path)


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_space.explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_memory_does_not_grow_with_the_tiles_of_a_slide(tile_folder: Path, tmp_path: Path) -> None:
    layers = (Scaled(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4096))
    wide = torch.nn.Sequential(*layers).requires_grad_(False)
    encoder = Encoder(
        "wide", 4096, ToInputSize(None), wide, build_encoder("mean_colour").provenance
    )
    geometry = TileGeometry("007", 64, 64, 0, 64, 0.0, 0.0, 0.0, 128, 192)
    peaks = []
    for count in (300, 3000):
        job = engine.SlideJob(
            "007", tile_folder, Coordinates(np.zeros((count, 2), np.int64), geometry), None
        )
        settings = engine.ExtractSettings(torch.device("cpu"), "fp32", 50, 0)
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
        start = resident("VmRSS")
        engine.encode_slides([job], encoder, tmp_path / str(count), settings, show=False)
        peaks.append(resident("VmHWM") - start)
        assert len(read_bag(tmp_path / str(count) / "h5_files" / "007.h5").features) == count
    # 2,700 more tiles are 44 MB of features
    assert peaks[1] - peaks[0] < 15e6, peaks


class Scaled(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float() / 255


def resident(name: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return 1024 * int(line.split()[1])


FILL = """
import sys
from wsi_common.cli import launch
from patch_encoder import extract_features
from patch_encoder.extraction import loop as engine
engine.check_room = lambda *_: None  # as when another program takes the room after that
launch(extract_features.main, extract_features.Config)
"""


@pytest.mark.process
def test_a_disk_that_is_really_full(cohort: Path, root: Path) -> None:
    """A file system of 80 KiB, mounted for this process alone: a bag takes 68 KiB at first and 8 to
    12 once it is finished.
    """
    (cohort / "features").mkdir()
    mount = f"mount -t tmpfs -o size=80k none {cohort}/features"
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False
    ).returncode:
        pytest.skip("a file system cannot be mounted here")
    script = (
        f'{mount} && "$0" "$@"; status=$?; ls -A {cohort}/features/mean_colour/h5_files; '
        "exit $status"
    )
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        script,
        sys.executable,
        "-c",
        FILL,
        *arguments(cohort, "workers=2"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert (
        "the disk is full or the quota used up" in lines[0]
        and "finished slides are kept" in lines[0]
    )
    assert done.stdout.split(), "finished slides are kept"
    assert all(name in ("S000.h5", "S001.h5", "S002.h5") for name in done.stdout.split()), (
        "and no halves"
    )
    assert len(done.stdout.split()) < 3
