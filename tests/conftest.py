"""Shared fixtures: one thread a process, tiny slides in real formats, the folder of real data when
it is there.

Files that take long are started first, so that workers end together.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import pytest
import torch
from PIL import Image

from tests.artefacts import tiny_benchmark, tiny_student  # noqa: F401  fixtures of all tests
from tests.helpers import ROOT, draw_slide, write_pyramid
from tests.warm_python import start_server

STUB = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
DATA = Path(os.environ.get("WSI_TEST_DATA", ROOT.parent / "shared" / "data"))
# torch.compile works in the process that asks: servers of its own would import PyTorch once more
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
gc.disable()  # until all tests are collected: what is imported stays


LONG = (
    "test_training_scripts",
    "test_notebook",
    "test_rendered",
    "test_heatmap",
    "test_which_slides",
    "test_start_pages",
    "test_by_task",
    "test_real_pictures",
    "test_sharing",
    "test_training_pool",
    "test_export_student",
    "test_export_detector",
    "test_classify_detections",
    "test_detector_training",
    "test_benchmark",
    "test_learning",
    "test_slides_that_kill",
    "test_evaluate",
    "test_real_teachers",
    "test_pages",
    "test_extract_student",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports go from worker to worker as UTF-8; a file's name in what was printed may be none."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    if report.failed and not isinstance(report.longrepr, str):
        text = str(report.longrepr)
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            report.longrepr = text.encode("utf-8", "backslashreplace").decode()
    return report


class Backwards(pytest.Dir):
    """A folder of tests that is read from its end."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        return reversed(list(super().collect()))


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
    """Every second worker reads folders from their end: what one has compiled, with pytest's own
    `assert`, is there for the other, so that each compiles a half.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    if int(worker) % 2 == 0 or (path / "__init__.py").exists():
        return None
    return Backwards.from_parent(parent, path=path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, then by name: the same order in all workers."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (places.get(item.path.stem, len(LONG)), item.path))


def pytest_collection_finish() -> None:
    """What all tests have imported is not searched for garbage again and again."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """At the end it is garbage like all else, else extension modules speak of leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real test data; tests that ask for it are skipped where it is absent."""
    if not (DATA / "INVENTORY.md").is_file():
        pytest.skip(f"real test data not found at {DATA}; set WSI_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def warm_python() -> Generator[Path, None, None]:
    """A program that stands for `python` and has imported PyTorch, see tests/warm_python.py."""
    with TemporaryDirectory() as folder:
        server, program = start_server(Path(folder))
        yield program
        server.kill()
        server.join()


@pytest.fixture
def no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed, and their files are there, but nothing is rendered into them: that
    takes longer than a tiny training. For tests that do not look at the figures.
    """

    def write_stub(figure: object, target: Path | BinaryIO, **_: object) -> None:
        if isinstance(target, Path):
            target.write_bytes(STUB)
        else:
            target.write(STUB)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write_stub)


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    """One 512 px pyramidal TIFF at 0.5 um per pixel."""
    return write_pyramid(tmp_path / "slides" / "S001.tiff", draw_slide(512))


@pytest.fixture
def tile_folder(tmp_path: Path) -> Path:
    """A 3 x 2 tile folder of 64 px tiles, one place empty; tile (r, c) has the grey value 40 r + 20
    c + 20.
    """
    folder = tmp_path / "slides" / "007"
    folder.mkdir(parents=True)
    for row, col in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        Image.new("RGB", (64, 64), (40 * row + 20 * col + 20,) * 3).save(
            folder / f"{row}_{col}.png"
        )
    return folder
