"""A small cohort on disk with a MIL problem in it: a positive slide holds a few tiles of another
kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mil.training import benchmark_jobs
from patch_encoder.bags.writer import write_bag

SIDE = 16


def geometry(slide_id: str, columns: int, rows: int) -> dict[str, object]:
    size = {"patch_size": SIDE, "patch_size_level0": SIDE, "patch_level": 0, "target_size": SIDE}
    scale = {"target_mpp": 0.5, "mpp": 0.5, "overlap": 0.0}
    return {
        "name": slide_id,
        **size,
        **scale,
        "level0_width": columns * SIDE,
        "level0_height": rows * SIDE,
    }


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_cohort(tmp_path: Path) -> Callable[..., Path]:
    """`make_cohort(name=.., slides=.., dim=.., signal=.., pictures=..)` -> folder below tmp_path,
    see `write_cohort`.
    """
    return lambda name="cohort", **options: write_cohort(tmp_path / name, **options)


@pytest.fixture
def failing_training(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, str], AbstractContextManager[None]]:
    """`with failing_training("max/seed1_fold1", "out of memory"):` one training of the benchmark
    raises, the others run.
    """
    train = benchmark_jobs.run_job

    @contextmanager
    def failing(place: str, error: str) -> Iterator[None]:
        def run_job(job, run, world):
            if job.output.match(place):
                raise RuntimeError(error)
            return train(job, run, world)

        with monkeypatch.context() as patch:
            patch.setattr(benchmark_jobs, "run_job", run_job)
            yield

    return failing


def write_cohort(
    root: Path,
    slides: int = 24,
    dim: int = 8,
    signal: float = 4.0,
    pictures: bool = False,
    seed: int = 0,
) -> Path:
    """A folder with labels.csv, bags/h5_files/ and slides/."""
    generator = np.random.default_rng(seed)
    rows = ["case_id,slide_id,label,split"]
    for i in range(slides):
        slide_id, positive = f"s{i:02d}", i % 2
        features = generator.normal(size=(12, dim)).astype(np.float32)
        features[:3, 0] += signal * positive
        corners = np.array([(c, r) for r in range(3) for c in range(4)]) * SIDE
        write_bag(
            root / "bags" / "h5_files" / f"{slide_id}.h5",
            features,
            corners,
            geometry(slide_id, 4, 3),
        )
        # two slides a patient for the first third
        case = i // 4 * 4 + i % 2 if i < slides // 3 else i
        split = ("train", "train", "train", "train", "test", "test")[case % 6]
        rows.append(f"case{case:02d},{slide_id},{'pos' if positive else 'neg'},{split}")
        if pictures:
            folder = root / "slides" / slide_id
            folder.mkdir(parents=True)
            for x, y in corners // SIDE:
                pixels = np.full((SIDE, SIDE, 3), 20 * (y * 4 + x), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{y}_{x}.jpg", quality=95)
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root
