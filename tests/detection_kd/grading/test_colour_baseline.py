"""What colour alone tells about graded patches."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from detection_kd.graded_patches.keys import GradedSetKeys, read_graded_split
from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.grading.arms import read_runs
from detection_kd.grading.colour_baseline import describe_colours, grade_by_colour
from tests.detection_kd.grading_runs import GRADES, SIDE, train, write_graded_set
from wsi_common.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set and a run."""
    folder = tmp_path_factory.mktemp("colour")
    train(write_graded_set(folder / "set"), folder / "runs" / "one", "epochs=1", "seed=3")
    return folder


def make_numbers(pixels: np.ndarray, ratio: int) -> np.ndarray:
    """Mean, spread and nine bins of each channel of uint8 (S, S, 3) in squares of pixels."""
    cells = SIDE // ratio
    means = pixels.astype(float).reshape(cells, ratio, cells, ratio, 3).mean((1, 3))
    flat = np.rint(means).reshape(-1, 3)
    bins = [np.histogram(flat[:, c] * 9 // 256, np.arange(10))[0] / len(flat) for c in range(3)]
    return np.concatenate([flat.mean(0) / 255, flat.std(0) / 255, *bins])


@pytest.mark.parametrize("ratio", [1, 4])
def test_calls_are_those_of_a_regression_on_colour_numbers(trained: Path, ratio: int) -> None:
    """At the pixels of a ratio, from the training patches alone."""
    source = str(trained / "set" / "patches.csv")
    split = read_graded_split(GradedSetKeys(source, grades=list(GRADES), folds=3), 0)
    numbers = []
    for own in (split.train, split.test):
        pixels = PatchPixels(own, SIDE)
        views = pixels.read(np.arange(len(own))).permute(0, 2, 3, 1).numpy()
        numbers.append(np.stack([make_numbers(view, ratio) for view in views]))
        assert np.abs(describe_colours(pixels, ratio) - numbers[-1]).max() < 1e-5
    centre, spread = numbers[0].mean(0), numbers[0].std(0)
    spread[spread < 1e-9] = 1
    model = LogisticRegression(class_weight="balanced", max_iter=1000, C=1.0)
    model.fit((numbers[0] - centre) / spread, split.train.labels)
    expected = model.predict((numbers[1] - centre) / spread)
    (found,) = grade_by_colour(read_runs(trained / "runs"), ratio)
    assert (found.seed, found.fold) == (3, 1) and (found.targets == split.test.labels).all()
    assert (found.predicted == expected).mean() > 0.9  # the strength of the penalty is chosen


def test_patches_that_are_others_by_now_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(trained, folder)
    table = folder / "set" / "patches.csv"
    run = train(write_graded_set(folder / "set"), folder / "runs" / "two", "epochs=1")
    shutil.rmtree(folder / "runs" / "one")
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match=f"expected the test patches of {run}.*colour=false"):
        grade_by_colour(read_runs(folder / "runs"), 1)
