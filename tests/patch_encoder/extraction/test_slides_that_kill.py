"""Slides that crash or hang their reader are listed by extraction, tiling and inspection, and all
others are the same.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from patch_encoder import extract_features, tile_slides
from patch_encoder import inspect_slides as inspect
from patch_encoder.extraction import decoding
from patch_encoder.extraction import ray_backend as ray_extraction
from patch_encoder.extraction import tile_batches as tile_module
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.slides.openslide_file import OpenSlideFile
from patch_encoder.tiles.coordinates import Coordinates, SlideJob, TileGeometry, read_coordinates
from tests.helpers import children, die, make_cohort
from tests.wsi_common.processes.fake_ray import FakeRay
from wsi_common.cli import run
from wsi_common.errors import UserError
from wsi_common.processes.crash_policy import CrashPolicy
from wsi_common.processes.pool import Lost
from wsi_common.processes.ray_cluster import RayPool, RaySettings

pytestmark = pytest.mark.process

TILING = [
    "tile_size=64",
    "tissue.mpp=2",
    "tissue.median=4",
    "tissue.closing=4",
    "tissue.min_area=50",
]
SEGFAULT = "the worker crashed (signal 11, SIGSEGV)"


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Four slides, tiled at 64 px."""
    root = make_cohort(tmp_path, 4)
    assert tile(root) == 0
    return root


def tile(root: Path, *extra: str) -> int:
    keys = [f"slides={root}/slides", f"output={root}/tiles", "workers=0", *TILING, *extra]
    return run(tile_slides.main, tile_slides.Config, keys)


def extract(root: Path, *extra: str) -> int:
    base = [
        f"slides={root}/slides",
        f"coords={root}/tiles",
        f"output={root}/features",
        "encoder=mean_colour",
    ]
    keys = [*base, "device=cpu", "precision=fp32", "workers=2", "batch_size=7", *extra]
    before = children()
    status = run(extract_features.main, extract_features.Config, keys)
    assert children() <= before, "no process is left"
    return status


def bags(root: Path, output: str = "features") -> dict[str, bytes]:
    return {
        path.stem: path.read_bytes()
        for path in sorted((root / output / "mean_colour" / "h5_files").iterdir())
    }


def failures(folder: Path) -> dict[str, str]:
    with (folder / "failures.csv").open(newline="") as stream:
        return {row["slide"]: row["error"] for row in csv.DictReader(stream)}


def struck(
    monkeypatch: pytest.MonkeyPatch,
    slide: str,
    act: Callable[[], None],
    tile: int = 0,
    root: Path | None = None,
) -> None:
    """`act` when a slide's tile of this number is read, or any region when `root` is not given."""
    corner = (
        read_coordinates(root / "tiles" / "coords" / f"{slide}.h5").coords[tile].tolist()
        if root
        else None
    )
    read = OpenSlideFile.read

    def bad(self: OpenSlideFile, x: int, y: int, size: int, level: int = 0) -> np.ndarray:
        if self.slide_id == slide and (corner is None or [x, y] == corner):
            act()
        return read(self, x, y, size, level)

    monkeypatch.setattr(OpenSlideFile, "read", bad)


@pytest.mark.parametrize(("tile_number", "workers"), [(0, 1), (10, 2), (18, 3)])
def test_a_slide_that_crashes_its_reader_is_listed_and_the_others_are_the_same(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, tile_number: int, workers: int
) -> None:
    assert extract(cohort, f"output={cohort}/clean", "workers=0") == 0
    struck(monkeypatch, "S001", lambda: die(signal.SIGSEGV), tile_number, cohort)
    # a limit on bad tiles does not make it a bag: how many were read is chance
    assert extract(cohort, f"workers={workers}", "max_bad_tiles=1") == 1
    wanted = bags(cohort, "clean")
    del wanted["S001"]
    assert bags(cohort) == wanted
    count = len(read_coordinates(cohort / "tiles" / "coords" / "S001.h5").coords)
    again = "and so did another before it; the slide is given up"
    found = failures(cohort / "features" / "mean_colour")
    assert found == {"S001": f"{SEGFAULT} at tile {tile_number + 1} of {count}, {again}"}


def test_a_slide_that_hangs_is_listed_after_the_timeout(
    cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extract(cohort, f"output={cohort}/clean", "workers=0") == 0
    struck(monkeypatch, "S000", lambda: time.sleep(60), 3, cohort)
    start = time.monotonic()
    assert extract(cohort, "read_timeout=0.7") == 1
    assert time.monotonic() - start < 20
    assert bags(cohort) == {
        name: data for name, data in bags(cohort, "clean").items() if name != "S000"
    }
    found = failures(cohort / "features" / "mean_colour")
    assert list(found) == ["S000"] and found["S000"].startswith(
        "the worker did not answer for 0.7 s at tile 4 of "
    )


def test_a_reader_that_is_killed_once_costs_nothing(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert extract(cohort, f"output={cohort}/clean", "workers=0") == 0
    mark = cohort / "died"

    def once() -> None:
        if not mark.exists():
            mark.touch()
            die(signal.SIGKILL)

    struck(monkeypatch, "S002", once, 5, cohort)
    assert extract(cohort) == 0
    assert (
        mark.exists()
        and "slide S002: the worker was killed (signal 9, SIGKILL: out of memory?) at tile 6"
        in caplog.text
    )
    assert bags(cohort) == bags(cohort, "clean")


def test_two_readers_lost_over_a_slide_at_once_are_one_try() -> None:
    policy = CrashPolicy(["a"], lambda slide, tile: f"tile {tile + 1} of 19")
    began = time.monotonic()
    policy.record_crash(Lost("killed", (0, 3), began))
    policy.record_crash(Lost("killed", (0, 9), began))
    assert not policy.given_up
    policy.record_crash(Lost("killed", (0, 3), time.monotonic()))
    assert policy.given_up == {
        0: "killed at tile 4 of 19, and so did another before it; the slide is given up"
    }


def test_readers_that_die_at_no_slide_end_the_run_with_one_line(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tile_module, "heartbeat", lambda *_: die(signal.SIGKILL))
    assert extract(cohort) == 2
    error = capsys.readouterr().err
    assert (
        "error: 3 decoding processes were lost one after the other" in error and "workers=" in error
    )
    assert error.count("\n") == 1
    assert not [path for path in (cohort / "features").rglob("*") if path.is_file()]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_reader_should_not_raise_is_listed_with_its_type(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    def bug() -> None:
        raise ZeroDivisionError("no tiles across")

    struck(monkeypatch, "S003", bug, 2, cohort)
    assert extract(cohort, f"workers={workers}") == 1
    found = failures(cohort / "features" / "mean_colour")
    assert list(found) == ["S003"] and found["S003"].endswith(
        "the first: ZeroDivisionError: no tiles across"
    )
    assert sorted(bags(cohort)) == ["S000", "S001", "S002"]
    assert workers or "Traceback" in caplog.text


def test_a_mistake_of_ours_is_not_a_slide_s(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()

    def mistake(tile: np.ndarray) -> torch.Tensor:
        raise LookupError("in the transform")

    jobs = [
        SlideJob(
            "S000",
            cohort / "slides" / "S000.tiff",
            read_coordinates(cohort / "tiles/coords/S000.h5"),
            None,
        )
    ]
    with pytest.raises(RuntimeError, match=r"(?s)in mistake.*LookupError: in the transform"):
        list(decoding.batches(TileSequence(jobs, mistake), 4, 1, 60.0))
    assert children() <= before


def test_tiling_goes_on_after_slides_that_kill_hang_or_have_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = children()
    root = make_cohort(tmp_path, 5)
    assert tile(root, f"output={root}/clean") == 0

    def bug() -> None:
        raise KeyError("tiff tag")

    for slide, act in (
        ("S000", lambda: die(signal.SIGABRT)),
        ("S002", lambda: time.sleep(60)),
        ("S003", bug),
    ):
        struck(monkeypatch, slide, act)
    assert tile(root, "workers=2", "read_timeout=1.5") == 1
    assert children() <= before
    assert failures(root / "tiles") == {
        "S000": "the worker crashed (signal 6, SIGABRT)",
        "S002": "the worker did not answer for 1.5 s",
        "S003": "KeyError: 'tiff tag'",
    }
    assert "KeyError" in caplog.text and "Traceback" in caplog.text
    names = {path.stem for path in (root / "tiles" / "coords").glob("[!.]*")}
    assert names == {"S001", "S004"}
    for name in names:
        pair = [
            read_coordinates(root / folder / "coords" / f"{name}.h5")
            for folder in ("tiles", "clean")
        ]
        assert pair[0].digest() == pair[1].digest()


def test_inspection_says_which_slides_kill(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = children()

    def look(*extra: str) -> int:
        keys = [f"slides={cohort}/slides", "tile_size=64", *extra]
        return run(inspect.main, inspect.Config, keys)

    assert look("workers=0", "json=true") == 0
    clean = json.loads(capsys.readouterr().out)
    struck(monkeypatch, "S001", lambda: die(signal.SIGSEGV))
    assert look("workers=2", "json=true") == 1
    found = json.loads(capsys.readouterr().out)
    assert found[1] == {
        "slide": "S001",
        "path": str(cohort / "slides" / "S001.tiff"),
        "error": SEGFAULT,
    }
    assert [found[0], *found[2:]] == [clean[0], *clean[2:]]
    assert look() == 1
    assert f"S001: {SEGFAULT}" in capsys.readouterr().out
    assert children() <= before


def test_numbers_that_cannot_be(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extract(cohort, "read_timeout=0") == 2
    assert tile(cohort, "read_timeout=-3") == 2
    assert tile(cohort, "workers=-1") == 2
    assert run(inspect.main, inspect.Config, [f"slides={cohort}/slides", "read_timeout=nan"]) == 2
    assert capsys.readouterr().err.count("expected") == 4


def test_ctrl_c_ends_an_extraction_that_hangs(cohort: Path, root: Path) -> None:
    script = (
        # a background job is deaf to it
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from patch_encoder import extract_features as e; from wsi_common.cli import launch;"
        "from patch_encoder.slides.openslide_file import OpenSlideFile as o; import os;"
        # in one piece
        "o.read = lambda *_: os.write(1, b'%d\\n' % os.getpid()) and time.sleep(60); "
        "launch(e.main, e.Config)"
    )
    base = [
        f"slides={cohort}/slides",
        f"coords={cohort}/tiles",
        f"output={cohort}/features",
        "encoder=mean_colour",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *base, "device=cpu", "workers=2"],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.count("error: interrupted") == 1, errors
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def ray_job(name: str, tiles: int = 1) -> SlideJob:
    geometry = TileGeometry(name, 8, 8, 0, 8, 0.0, 0.0, 0.0, 8, 8)
    return SlideJob(name, Path(name), Coordinates(np.zeros((tiles, 2), np.int64), geometry), None)


def test_a_bundle_that_kills_ray_workers_is_taken_apart_and_the_slide_that_does_it_is_listed() -> (
    None
):
    bundle = [ray_job("a", 3), ray_job("b", 2)]
    assert ray_extraction.after_death(bundle, 2, "gone") == ([(bundle, 2)], ray_extraction.NOTHING)
    assert ray_extraction.after_death(bundle, 3, "gone") == (
        [(bundle[:1], 2), (bundle[1:], 2)],
        ray_extraction.NOTHING,
    )
    again, report = ray_extraction.after_death(bundle[:1], 3, "gone")
    assert not again and (report.slides, report.tiles) == (1, 3)
    row = {
        "slide": "a",
        "stage": "extract_features",
        "error": "3 workers of Ray died over it, the last: gone",
    }
    assert report.failures == [row]


def ray_pool(work: Callable, count: int, monkeypatch: pytest.MonkeyPatch) -> RayPool:
    monkeypatch.setattr(
        "wsi_common.processes.ray_cluster.import_ray", lambda: FakeRay({"CPU": 8.0})
    )
    return RayPool(work, RaySettings(workers=count), cpus=1, on_cuda=False)


@pytest.mark.parametrize("count", [1, 3])
def test_ray_lists_a_slide_that_always_kills_its_worker(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def work(part: list[SlideJob]) -> ray_extraction.Report:
        if any(job.slide_id == "b" for job in part):
            raise SystemExit(7)
        done.extend(job.slide_id for job in part)
        return ray_extraction.Report(len(part), len(part), 0.0, 0.0, [])

    bundles = [[ray_job("a"), ray_job("b")], [ray_job("c")], [ray_job("d")]]
    pool = ray_pool(work, count, monkeypatch)
    report = ray_extraction.encode_bundles(pool, bundles)
    assert (report.slides, report.tiles, sorted(done)) == (4, 4, ["a", "c", "d"])
    assert pool._ray.killed == 4
    assert [(row["slide"], row["error"]) for row in report.failures] == [
        ("b", "3 workers of Ray died over it, the last: actor died")
    ]


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (SystemExit(7), UserError, "engine=ray: 3 workers of Ray died over it.*lower batch_size"),
        (UserError("expected x"), UserError, "^expected x$"),
        (KeyError("lost"), RuntimeError, "(?s)a worker of Ray raised.*KeyError: 'lost'"),
    ],
)
def test_ray_ends_when_every_slide_kills_or_the_work_raises(
    raised: BaseException, expected: type, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(part: list[SlideJob]) -> ray_extraction.Report:
        raise raised

    with pytest.raises(expected, match=text):
        bundles = [[ray_job(name)] for name in "abcd"]
        ray_extraction.encode_bundles(ray_pool(work, 2, monkeypatch), bundles)
