"""Rendered grades: fine detail tells them apart and the amount of stain does not, labels are wrong
as often as asked, biopsies have their truth, and other stages read all of it.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_kd.graded_patches.graded_set import UNGRADED
from detection_kd.graded_patches.keys import GradedSetKeys, read_graded_split
from detection_kd.graded_patches.patch_pixels import PatchPixels
from patch_encoder.demo.histology.biopsy import draw_biopsy
from patch_encoder.demo.histology.glands import GRADES, GlandPlan, draw_glands
from patch_encoder.demo.render_grades import Config, main
from patch_encoder.slides import open_slide
from wsi_common.errors import UserError
from wsi_common.files import sha256_file

SMALL = {
    "patch_slides": 4,
    "test_patch_slides": 2,
    "patch_side": 32,
    "biopsies": 1,
    "biopsy_side": 512,
    "workers": 1,
}


def render(folder: Path, **keys: object) -> Path:
    assert main(Config(output=str(folder), **{**SMALL, **keys})) == 0
    return folder


def digests(folder: Path, part: str) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.glob(part))}


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("grades"))


@pytest.fixture(scope="module")
def tissues() -> list[GlandPlan]:
    """320 px of each grade."""
    shape = (320, 320)
    return [
        draw_glands(np.random.default_rng(grade), np.full(shape, grade), np.ones(shape, np.float32))
        for grade in range(4)
    ]


def test_detail_rises_with_the_grade_and_more_so_before_averaging(
    tissues: list[GlandPlan],
) -> None:
    fine, coarse = [], []
    for tissue in tissues:
        amount = tissue.canvas.haematoxylin
        small = amount.reshape(80, 4, 80, 4).mean((1, 3))
        inside = tissue.epithelium.reshape(80, 4, 80, 4).min((1, 3)) > 0.95
        lost = amount - small.repeat(4, 0).repeat(4, 1)
        fine.append(float(lost[inside.repeat(4, 0).repeat(4, 1)].std()))
        coarse.append(float(small[inside].std()))
    assert np.all(np.diff(fine) > 0)
    assert fine[3] / fine[0] - 1 > 1.2 * (coarse[3] / coarse[0] - 1)


def test_no_grade_has_more_stain(tissues: list[GlandPlan]) -> None:
    for name in ("haematoxylin", "eosin"):
        means = [
            float(getattr(tissue.canvas, name)[tissue.epithelium > 0.95].mean())
            for tissue in tissues
        ]
        assert max(means) < 1.15 * min(means), (name, means)


def test_patches_are_a_graded_set_with_its_test_slides(cohort: Path) -> None:
    keys = GradedSetKeys(str(cohort / "patches.csv"), grades=list(GRADES), folds=4, fold=2)
    split = read_graded_split(keys, seed=0)
    assert set(split.test.cases) == {"test_000", "test_001"}
    assert len(set(split.train.cases)) == 3 and len(set(split.val.cases)) == 1
    pixels = PatchPixels(split.test, 32).read(np.arange(4))
    assert pixels.shape == (4, 3, 32, 32) and pixels.float().std() > 10


def test_training_labels_are_wrong_by_one_grade(cohort: Path) -> None:
    rows = read_rows(cohort / "patches.csv")
    train = [row for row in rows if row["split"] == "train"]
    wrong = [row for row in train if row["label"] != row["truth"]]
    # of the first and the last grade, half of the patches that are misread keep their label
    assert 0.18 < len(wrong) / len(train) < 0.34
    steps = {GRADES.index(row["label"]) - GRADES.index(row["truth"]) for row in wrong}
    assert steps == {-1, 1}
    assert all(row["label"] == row["truth"] for row in rows if row["split"] == "test")
    assert all(f"/{row['truth']}_" in row["image"] for row in rows)
    counts = Counter(row["truth"] for row in rows)
    assert min(counts[grade] for grade in GRADES) > 0.7 * max(counts.values())


def test_a_seed_draws_training_patches_and_no_test_patches(cohort: Path, tmp_path: Path) -> None:
    other = render(tmp_path / "other", seed=1)
    again = render(tmp_path / "again")
    for part in ("patches/test*/*.png", "slides/*.tiff", "truth/*.png"):
        # the comment of a slide names its settings
        if not part.endswith("tiff"):
            assert digests(cohort, part) == digests(other, part) != {}
        assert digests(cohort, part) == digests(again, part)
    train = [digests(folder, "patches/train*/*.png") for folder in (cohort, other, again)]
    assert train[0] == train[2] and not set(train[0].values()) & set(train[1].values())


def test_ungraded_patches_say_nothing_of_grades_and_change_no_others(
    cohort: Path, tmp_path: Path
) -> None:
    folder = render(tmp_path / "more", ungraded_slides=2, biopsies=0)
    assert (folder / "patches.csv").read_bytes() == (cohort / "patches.csv").read_bytes()
    assert not (cohort / "ungraded.csv").exists()
    rows = read_rows(folder / "ungraded.csv")
    assert list(rows[0]) == ["image", "group"]
    keys = GradedSetKeys(str(folder / "patches.csv"), grades=list(GRADES), folds=4)
    keys.ungraded = str(folder / "ungraded.csv")
    further = read_graded_split(keys, seed=0).train
    further = further.select(further.labels == UNGRADED)
    assert set(further.cases) == {"ungraded_004", "ungraded_005"} and len(further) == len(rows)
    drawn = digests(folder, "patches/*/*.png")
    assert len(set(drawn.values())) == len(drawn)


def test_a_biopsy_has_its_truth(cohort: Path) -> None:
    with open_slide(cohort / "slides" / "biopsy_01.tiff") as slide:
        assert slide.mpp == pytest.approx(1.0) and slide.width == slide.height == 512
        pixels = slide.read(0, 0, 512)
    with Image.open(cohort / "truth" / "biopsy_01.png") as image:
        truth = np.asarray(image)
    glass = truth == 0
    assert 0.1 < glass.mean() < 0.8
    assert np.median(pixels[glass].min(axis=1)) > 225
    assert np.median(pixels[~glass].min(axis=1)) < 190
    row = read_rows(cohort / "biopsies.csv")[0]
    counts = [int(row[grade]) for grade in GRADES]
    assert counts == [int((truth == 1 + grade).sum()) for grade in range(4)]


def test_biopsies_of_several_grades_change_along_the_strip() -> None:
    truths = [draw_biopsy((5, number), 700, "soft").truth for number in range(4)]
    assert any(len(np.unique(truth)) > 2 for truth in truths)
    assert np.array_equal(truths[0], draw_biopsy((5, 0), 700, "soft").truth)


def test_a_cohort_is_kept_and_one_of_other_settings_is_refused(cohort: Path) -> None:
    before = digests(cohort, "**/*.*")
    slide = cohort / "slides" / "biopsy_01.tiff"
    slide.unlink()
    render(cohort)
    assert digests(cohort, "**/*.*") == before
    with pytest.raises(UserError, match="other settings"):
        render(cohort, seed=2)
    with pytest.raises(UserError, match="'patch_side': expected 16 to 512, found 8"):
        render(cohort, patch_side=8)
