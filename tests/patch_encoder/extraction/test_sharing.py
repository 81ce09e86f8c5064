"""A cohort on several processes: shards without coordination, the script that starts them, and Ray
with a worker that dies.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from patch_encoder import extract_features
from patch_encoder.cohort.shards import Shard, count_tiles, make_bundles
from patch_encoder.tiles.coordinates import Coordinates, SlideJob, TileGeometry
from tests.helpers import draw_slide, forget_slides, make_cohort, write_pyramid
from tests.patch_encoder.extraction.conftest import arguments, tile
from wsi_common.cli import run
from wsi_common.errors import UserError
from wsi_common.files import write_text
from wsi_common.processes.ray_cluster import worker_count


def job(name: str, tiles: int) -> SlideJob:
    geometry = TileGeometry(name, 8, 8, 0, 8, 0.0, 0.0, 0.0, 8, 8)
    return SlideJob(name, Path(name), Coordinates(np.zeros((tiles, 2), np.int64), geometry), None)


JOBS = [job(f"S{index}", tiles) for index, tiles in enumerate((5, 90, 3, 40, 40, 2, 1))]


def test_shards_part_a_cohort_by_size() -> None:
    parts = [Shard.parse(f"{index}/3").select(JOBS) for index in (1, 2, 3)]
    assert [[len(j.coordinates.coords) for j in part] for part in parts] == [
        [90, 5, 1],
        [40, 3],
        [40, 2],
    ]
    assert sorted(j.slide_id for part in parts for j in part) == sorted(j.slide_id for j in JOBS)
    assert Shard.parse("2/3").select(JOBS[::-1]) == parts[1], (
        "the order of the folder does not matter"
    )
    assert (
        Shard.parse("").select(JOBS) == JOBS
        and Shard.parse("").name == ""
        and Shard.parse("2/3").name == "2-of-3"
    )
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(UserError, match="expected i/n"):
            Shard.parse(text)


def test_bundles_are_largest_first_and_small_slides_share_one() -> None:
    found = [[len(j.coordinates.coords) for j in bundle] for bundle in make_bundles(JOBS, 6)]
    assert found == [[90], [40], [40], [5, 3], [2, 1]]
    assert len(make_bundles(JOBS, 1)) == len(JOBS)
    assert count_tiles(JOBS) == 181 and make_bundles([], 5) == []


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A larger slide and three small ones, tiled at 32 px."""
    root = make_cohort(tmp_path)
    write_pyramid(root / "slides" / "S003.tiff", draw_slide(1024, seed=3))
    (root / "labels.csv").write_text((root / "labels.csv").read_text() + "C3,S003,negative\n")
    return tile(root, 32)


def keys(root: Path, *extra: str) -> list[str]:
    return arguments(root, "encoder=stain_texture", "batch_size=16", *extra)


def extract(root: Path, *extra: str) -> int:
    return run(extract_features.main, extract_features.Config, keys(root, *extra))


def as_bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted((folder / "stain_texture" / "h5_files").iterdir())
    }


def environment(root: Path, python: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "ENV": "active",
        "PYTHON": str(python),
    }


def test_shards_keep_lists_of_their_own_and_the_whole_run_clears_them(cohort: Path) -> None:
    folder = cohort / "features" / "mean_colour"
    largest, smallest = (
        cohort / "slides" / "S003.tiff",
        cohort / "slides" / "S000.tiff",
    )  # one in each part
    whole = largest.read_bytes(), smallest.read_bytes()
    forget_slides(cohort / "tiles")
    largest.write_bytes(whole[0][:500])
    smallest.write_bytes(whole[1][:500])
    (cohort / "tiles" / "coords" / "S001.h5").unlink()
    assert [extract(cohort, "encoder=mean_colour", f"shard={i}/2") for i in (1, 2)] == [1, 1]
    lists = {path.name: path.read_text() for path in folder.glob("failures*")}
    assert sum(text.count("S001") > 0 for text in lists.values()) == 1, (
        "what no part can do is listed once"
    )
    assert "S003" in lists["failures.1-of-2.csv"] and "failures.csv" not in lists
    largest.write_bytes(whole[0])
    smallest.write_bytes(whole[1])
    assert extract(cohort, "encoder=mean_colour") == 1  # S001 still has no coordinates
    assert [path.name for path in folder.glob("failures*")] == ["failures.csv"]


@pytest.mark.process
def test_script_starts_a_process_a_gpu_and_takes_the_worst_status(
    cohort: Path, root: Path, warm_python: Path
) -> None:
    script = ["bash", str(root / "tools" / "extract_features.sh")]
    shared = environment(root, warm_python) | {
        "GPUS": "2",
        "COORDS": f"{cohort}/tiles",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*script, *keys(cohort)], env=shared, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"(\d) slides, 0 already done", done.stderr)) == ["2", "2"]
    assert extract(cohort, f"output={cohort}/alone") == 0
    assert as_bytes(cohort / "features") == as_bytes(cohort / "alone")
    forget_slides(cohort / "tiles")
    (cohort / "slides" / "S003.tiff").write_bytes(b"broken")
    done = subprocess.run(
        [*script, *keys(cohort, f"output={cohort}/again")],
        env=shared,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0


def test_ray_that_is_not_there_is_one_line(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert extract(cohort, "engine=ray") == 2
    error = capsys.readouterr().err
    assert "expected the package ray, found none; pip install" in error and error.count("\n") == 1
    assert not (cohort / "features").exists()


def test_workers_that_the_cluster_has_no_room_for_are_refused() -> None:
    assert worker_count({"CPU": 13.0}, 0, 4, on_cuda=False) == 3
    assert worker_count({"CPU": 64.0, "GPU": 2.0}, 0, 4, on_cuda=True) == 2
    assert worker_count({"CPU": 64.0, "GPU": 2.0}, 1, 4, on_cuda=True) == 1
    for resources, on_cuda in (({"CPU": 3.0}, False), ({"CPU": 64.0}, True)):
        with pytest.raises(UserError, match="expected room for 1 workers of 4 CPUs"):
            worker_count(resources, 0, 4, on_cuda=on_cuda)


def find_holder(path: Path) -> int:
    """The process that has a file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # a process that has gone, or is another user's
            if descriptor.readlink() == path:
                return int(descriptor.parts[2])
    raise AssertionError(f"nobody has {path} open")


@pytest.mark.process
def test_a_worker_of_ray_that_is_killed_is_replaced_and_its_slide_done_again(
    cohort: Path, root: Path, warm_python: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is an optional dependency")
    command = [
        str(warm_python),
        "-m",
        "patch_encoder.extract_features",
        *keys(cohort, "batch_size=2"),
    ]
    ray_keys = ["engine=ray", "ray.workers=2", "ray.cpus=1"]
    process = subprocess.Popen(
        [*command, *ray_keys], env=environment(root, warm_python), stderr=subprocess.PIPE, text=True
    )
    # the worker of the largest slide has its hidden file open
    part = cohort / "features" / "stain_texture" / "h5_files"
    deadline = time.monotonic() + 300
    while (
        not (under_way := list(part.glob(".S003.h5.*.tmp")))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    assert under_way, process.communicate()[1][-3000:]
    os.kill(find_holder(under_way[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert "a worker died, its slides are done again: S003" in errors
    assert "4 slides encoded, 0 failed" in errors
    # what the killed worker left goes with the next file that is written once it is 10 s old
    left = [path for path in part.iterdir() if path.name.startswith(".")]
    assert len(left) <= 1
    for path in left:
        os.utime(path, (0, 0))
    write_text(part / "next.txt", "")
    (part / "next.txt").unlink()
    assert extract(cohort, f"output={cohort}/alone") == 0
    assert as_bytes(cohort / "features") == as_bytes(cohort / "alone")
