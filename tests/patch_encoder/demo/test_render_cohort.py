"""The embedded cohort: real slide files, the same bytes again, no class leak in colour or counts,
no mixing of cohorts.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from patch_encoder.demo.cytology import sample_plan
from patch_encoder.demo.cytology.cells import ABNORMAL, NORMAL
from patch_encoder.demo.cytology.sample_plan import PlannedSlide, plan_fields, plan_slides
from patch_encoder.demo.cytology.smear import draw_smear, lesion_boxes
from patch_encoder.demo.pyramid import halve
from patch_encoder.demo.render_cohort import Config, main
from patch_encoder.descriptors.mean_colour import mean_colour
from patch_encoder.descriptors.stain_texture import stain_texture
from tests.helpers import ROOT
from wsi_common.errors import UserError
from wsi_common.files import sha256_file

SIDE = 512
SMALL = {
    "side": SIDE,
    "pretrain_slides": 4,
    "cv_slides": 6,
    "field_side": 128,
    "train_fields": 6,
    "val_fields": 3,
    "workers": 1,
}


def render(folder: Path, **keys: object) -> Path:
    assert main(Config(output=str(folder), **{**SMALL, **keys})) == 0
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def labels(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("cohort"))


def test_slides_open_as_pyramids_with_their_resolution(cohort: Path) -> None:
    paths = sorted((cohort / "slides").iterdir())
    assert [path.name for path in paths] == [f"S{number:04d}.tiff" for number in range(1, 11)]
    with openslide.OpenSlide(paths[0]) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_dimensions == ((SIDE, SIDE), (SIDE // 2, SIDE // 2))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert slide.properties["openslide.level[0].tile-width"] == "256"
        base = np.asarray(slide.read_region((0, 0), 0, (SIDE, SIDE)).convert("RGB"))
        lower = np.asarray(slide.read_region((0, 0), 1, (SIDE // 2, SIDE // 2)).convert("RGB"))
    picture, _ = draw_smear(plan_slides(0, SIDE, {"pretrain": 4, "cv": 6}, 0.25)[0].smear())
    assert np.array_equal(base, picture), "pixels are kept without loss"
    assert np.array_equal(lower, halve(picture))


def test_halving_is_the_rounded_mean_of_four_pixels() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    expected = np.floor(picture[:, :8].reshape(3, 2, 4, 2, 3).mean(axis=(1, 3)) + 0.5)
    assert np.array_equal(halve(picture), expected)


def test_labels_are_balanced_and_patients_stay_in_one_split(cohort: Path) -> None:
    rows = labels(cohort)
    assert Counter((row["split"], row["label"]) for row in rows) == {
        ("pretrain", "positive"): 2, ("pretrain", "negative"): 2, ("cv", "positive"): 3,
        ("cv", "negative"): 3,
    }  # fmt: skip
    assert all(row["mpp"] == "" for row in rows)
    planned = plan_slides(0, SIDE, {"pretrain": 24, "cv": 60}, 0.25)
    by_case: dict[str, list[PlannedSlide]] = {}
    for slide in planned:
        by_case.setdefault(slide.case_id, []).append(slide)
    assert all(len({(slide.label, slide.split) for slide in own}) == 1 for own in by_case.values())
    assert Counter(len(own) for own in by_case.values()) == {1: 52, 2: 16}
    order = [slide.label for slide in planned if slide.split == "cv"]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_every_file_is_the_same_again_with_more_processes(cohort: Path, tmp_path: Path) -> None:
    assert digests(render(tmp_path / "again", workers=2)) == digests(cohort)


def test_pixels_are_those_of_every_other_machine() -> None:
    picture, boxes = draw_smear(plan_slides(0, 256, {"cv": 2}, 0.0)[0].smear())
    assert hashlib.sha256(picture.tobytes()).hexdigest()[:16] == "9543231c9b5c701e"
    assert boxes == [(18, 200, 58, 243)]


def test_another_seed_gives_other_pixels(cohort: Path, tmp_path: Path) -> None:
    other = digests(render(tmp_path / "other", seed=1, cv_slides=0, train_fields=1, val_fields=0))
    assert not set(other.values()) & set(digests(cohort).values())


@pytest.mark.process
def test_a_killed_run_goes_on_to_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    keys = [f"{name}={value}" for name, value in {**SMALL, "output": folder}.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "patch_encoder.demo.render_cohort", *keys],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob("slides/S*.tiff")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(folder.glob("slides/S*.tiff")) and not (folder / "labels.csv").exists()
    assert digests(render(folder)) == digests(cohort)


def test_whole_files_are_kept_and_broken_ones_drawn_anew(cohort: Path, tmp_path: Path) -> None:
    folder = render(tmp_path / "mended")
    kept, cut, gone = (folder / "slides" / f"S000{number}.tiff" for number in (1, 2, 3))
    before = kept.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-5000])
    gone.unlink()
    field = folder / "detection" / "images" / "train_0002.jpg"
    field.write_bytes(field.read_bytes()[:2000])
    render(folder)
    assert kept.stat().st_mtime_ns == before
    assert digests(folder) == digests(cohort)


def test_cohorts_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    tiny = {"side": 256, "pretrain_slides": 2, "cv_slides": 0, "train_fields": 1, "val_fields": 0}
    folder = render(tmp_path / "cohort", **tiny)
    before = digests(folder)
    with pytest.raises(UserError, match="settings.seed 0 -> 5.*overwrite=true"):
        render(folder, **tiny, seed=5)
    assert digests(folder) == before
    render(folder, **tiny, seed=5, overwrite=True)
    assert digests(folder) == digests(render(tmp_path / "fresh", **tiny, seed=5))


def test_a_folder_without_a_stamp_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label\n1,1,a\n")
    with pytest.raises(UserError, match="holds labels.csv without cohort.json"):
        render(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.csv"]


@pytest.mark.parametrize(
    ("name", "value"), [("side", 100), ("seed", -1), ("double_share", 1.5), ("cv_slides", -2)]
)
def test_numbers_that_cannot_be_drawn_are_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"key '{name}': expected .* found {value:g}"):
        render(tmp_path / "no", **{name: value})
    assert not (tmp_path / "no").exists()


def test_detection_fields_are_coco_with_boxes_inside(cohort: Path) -> None:
    boxes = 0
    for subset, count in (("train", 6), ("val", 3)):
        document = json.loads((cohort / "detection" / f"{subset}.json").read_text())
        assert document["categories"] == [{"id": 1, "name": "lesion"}]
        assert len(document["images"]) == count
        for image in document["images"]:
            with Image.open(cohort / "detection" / "images" / image["file_name"]) as picture:
                assert picture.format == "JPEG" and picture.size == (
                    image["width"],
                    image["height"],
                ) == (128, 128)
        for annotation in document["annotations"]:
            x, y, width, height = annotation["bbox"]
            assert (
                width > 0
                and height > 0
                and x >= 0
                and y >= 0
                and x + width <= 128
                and y + height <= 128
            )
            assert annotation["area"] == width * height and annotation["image_id"] <= count
            boxes += 1
    assert boxes > 0


def test_some_fields_have_no_lesion_and_most_have() -> None:
    found = [bool(lesion_boxes(field.smear())) for field in plan_fields(0, 256, {"train": 60})]
    assert 0.5 < np.mean(found) < 0.9


def test_only_positive_slides_have_lesions_and_the_boxes_hold_dark_nuclei(cohort: Path) -> None:
    document = json.loads((cohort / "annotations.json").read_text())
    positive = {
        f"slides/{row['slide_id']}.tiff" for row in labels(cohort) if row["label"] == "positive"
    }
    names = {image["id"]: image["file_name"] for image in document["images"]}
    assert {names[annotation["image_id"]] for annotation in document["annotations"]} == positive
    for annotation in document["annotations"]:
        x, y, width, height = annotation["bbox"]
        part = tifffile.imread(cohort / names[annotation["image_id"]])[
            y : y + height, x : x + width
        ]
        # both red and green are absorbed only by chromatin, which fills a good part of an abnormal
        # cell
        assert (part[..., :2].max(axis=2) < 150).sum() > 80


def test_boxes_are_known_without_drawing_the_rest() -> None:
    smear = next(
        slide for slide in plan_slides(3, 256, {"cv": 4}, 0.0) if slide.label == "positive"
    ).smear()
    _, boxes = draw_smear(smear)
    assert boxes == lesion_boxes(smear) and boxes


def test_both_classes_have_the_same_cells_clutter_and_stains() -> None:
    slides = plan_slides(1, 1024, {"cv": 160}, 0.25)
    counts: dict[str, list[list[float]]] = {"positive": [], "negative": []}
    for slide in slides:
        smear = slide.smear()
        cells = sum(thing.drawing in NORMAL or thing.drawing in ABNORMAL for thing in smear.things)
        abnormal = sum(thing.abnormal for thing in smear.things)
        assert (abnormal > 0) == (slide.label == "positive") and abnormal <= sample_plan.ABNORMAL[
            1
        ] * cells + 1
        counts[slide.label].append(
            [
                cells,
                len(smear.things) - cells,
                smear.marked,
                *smear.style.lamp,
                smear.style["cyan"][0],
            ]
        )
    positive, negative = (
        np.array(counts[label], dtype=float) for label in ("positive", "negative")
    )
    errors = np.sqrt(positive.var(axis=0) / len(positive) + negative.var(axis=0) / len(negative))
    assert np.all(np.abs(positive.mean(axis=0) - negative.mean(axis=0)) < 3.5 * errors)


def pooled(
    slides: list[PlannedSlide], describe: object, side: int, kinds: tuple[str, ...]
) -> np.ndarray:
    rows = []
    for slide in slides:
        picture, _ = draw_smear(slide.smear())
        corners = range(0, side, 128)
        tiles = np.array(
            [describe(picture[y : y + 128, x : x + 128]) for y in corners for x in corners]
        )  # type: ignore[operator]
        rows.append(np.concatenate([getattr(tiles, kind)(axis=0) for kind in kinds]))
    return np.array(rows)


def cross_validated_auc(slides: list[PlannedSlide], features: np.ndarray, strength: float) -> float:
    positive = np.array([slide.label == "positive" for slide in slides])
    cases = [slide.case_id for slide in slides]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(
        model, features, positive, groups=cases, cv=folds, method="decision_function"
    )
    return float(roc_auc_score(positive, scores))


def test_mean_colour_does_not_tell_the_classes() -> None:
    slides = plan_slides(0, SIDE, {"cv": 32}, 0.25)
    features = pooled(slides, mean_colour, SIDE, ("mean", "max", "min"))
    for columns in (3, 9):
        assert cross_validated_auc(slides, features[:, :columns], 1.0) < 0.7


@pytest.mark.slow
def test_texture_tells_the_classes_of_the_default_cohort_and_colour_does_not() -> None:
    slides = [
        slide
        for slide in plan_slides(0, 1536, {"pretrain": 24, "cv": 60}, 0.25)
        if slide.split == "cv"
    ]
    assert (
        cross_validated_auc(slides, pooled(slides, mean_colour, 1536, ("mean", "max", "min")), 1.0)
        < 0.7
    )
    assert (
        cross_validated_auc(slides, pooled(slides, stain_texture, 1536, ("mean", "max")), 0.1)
        > 0.85
    )
