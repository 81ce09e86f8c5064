"""The atypical-figure head: it learns shapes on slides that it has not seen, goes on after a kill,
and its checkpoint alone scores figures on slides.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd import train_atypical
from detection_kd.models.atypical import (
    AtypicalHead,
    CropFeatures,
    load_atypical,
    read_crops,
    resize_crop,
    score_crops,
)
from detection_kd.models.cam import LocaliserKeys, WeakLocaliser
from detection_kd.train_atypical import Config, main
from patch_encoder.probing.fine_tune import FineTuneKeys
from patch_encoder.probing.pictures import read_picture
from patch_encoder.slides import open_slide
from tests.helpers import write_pyramid
from wsi_common.checkpoint import save_checkpoint
from wsi_common.errors import UserError

NETWORK = LocaliserKeys(trunk="small", init="random")
SLIDES = 12


def draw_crop(rng: np.random.Generator, atypical: bool, slide: int) -> np.ndarray:
    """One long dark bar, or two short ones that together are as dark: colour says nothing."""
    crop = np.full((128, 128, 3), (200, 120 + 5 * slide, 190), np.float64)
    x = int(rng.integers(44, 52))
    for left, right in ((0, 12), (26, 38)) if atypical else ((0, 24),):
        crop[58:70, x + left : x + right] = (70, 30, 110)
    return np.clip(crop + rng.normal(0, 8, crop.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng, rows = tmp_path_factory.mktemp("crops"), np.random.default_rng(0), []
    for name in ("normal", "atypical"):
        (folder / "patches" / name).mkdir(parents=True)
    for uid in range(SLIDES * 8):
        atypical = uid % 8 < 3
        crop = draw_crop(rng, atypical, uid // 8)
        name = ("normal", "atypical")[atypical]
        Image.fromarray(crop).save(folder / "patches" / name / f"MIDOG21_{uid}.png")
        rows.append((f"{uid // 8 + 1:03d}.tiff", "MIDOG21", uid, 0, 0, atypical))
    with (folder / train_atypical.TABLE).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("slide", "dataset", "uid", "x", "y", "majority_atypical"))
        writer.writerows(rows)
    return folder


def run(crops: Path, output: Path, **keys: object) -> Path:
    settings = {"network": NETWORK, "target_mpp": 1.0, "folds": 3, "resamples": 50, "workers": 0}
    tuning = FineTuneKeys(epochs=4, lr=4e-3, layer_decay=1.0, batch_size=16)
    settings |= {"device": "cpu", "fine_tune": tuning, **keys}
    assert main(Config(output=str(output), crops=str(crops), **settings)) == 0
    return output


@pytest.fixture(scope="module")
def trained(crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(crops, tmp_path_factory.mktemp("run"))


def find_crops(crops: Path, rows: list[dict[str, str]]) -> list[Path]:
    folders = {"typical": "normal", "atypical": "atypical"}
    return [crops / "patches" / folders[row["label"]] / row["crop"] for row in rows]


def read_scores(folder: Path) -> list[dict[str, str]]:
    with (folder / "atypical.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_it_learns_what_colour_does_not_tell_on_slides_apart(trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    assert (results["crops"], results["atypical"], results["slides"]) == (96, 36, SLIDES)
    network, colour = (results[name] for name in ("network", "colour_statistics"))
    assert network["balanced_accuracy_mean"] > 0.85 > colour["balanced_accuracy_mean"]
    low, high = colour["balanced_accuracy_ci"]
    assert low <= colour["balanced_accuracy_mean"] <= high
    assert results["difference"]["balanced_accuracy_difference"] > 0.2
    rows = read_scores(trained)
    folds = {(row["slide"], row["fold"]) for row in rows}
    assert len(rows) == 96 and len(folds) == SLIDES, "a slide is in one fold"


def test_a_killed_run_goes_on_to_the_same_bytes(
    crops: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, train = [], train_atypical.AtypicalStudy.train

    def stop_in_the_second_fold(study: object, indices: np.ndarray) -> AtypicalHead:
        calls.append(len(indices))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(study, indices)

    monkeypatch.setattr(train_atypical.AtypicalStudy, "train", stop_in_the_second_fold)
    with pytest.raises(KeyboardInterrupt):
        run(crops, tmp_path)
    assert not (tmp_path / "results.json").exists()
    run(crops, tmp_path)
    assert len(calls) == 2 + 3, "the first fold is not trained again"
    for name in ("checkpoint_best.pt", "atypical.csv", "results.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name
    run(crops, tmp_path)
    assert len(calls) == 5, "a finished run does nothing"
    with pytest.raises(UserError, match="overwrite=true"):
        run(crops, tmp_path, seed=3)


def test_the_checkpoint_alone_scores_figures_on_slides(
    crops: Path, trained: Path, tmp_path: Path
) -> None:
    model = load_atypical(trained / "checkpoint_best.pt")
    assert (model.mpp, model.side) == (1.0, 32) and not model.training
    rng = np.random.default_rng(5)
    slide = np.full((512, 512, 3), 230, np.uint8)
    points, wanted = [], []
    for number in range(4):
        x = y = 20 + 120 * number
        slide[y : y + 128, x : x + 128] = draw_crop(rng, number % 2 == 0, number)
        points.append((x + 64.0, y + 64.0))
        wanted.append(number % 2 == 0)
    path = write_pyramid(tmp_path / "slide.tiff", slide, mpp=0.25, levels=(1,))
    with open_slide(path) as opened:
        found = read_crops(opened, points, model)
        at_the_corner = read_crops(opened, [(0.0, 0.0)], model)
        assert read_crops(opened, [], model).shape == (0, 32, 32, 3)
    assert found.shape == (4, 32, 32, 3) and at_the_corner.shape == (1, 32, 32, 3)
    first = resize_crop(slide[20:148, 20:148], 1.0).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found[0], first)
    scores = score_crops(model, found, batch_size=3)
    assert (scores > 0.5).tolist() == wanted
    turned = score_crops(model, np.ascontiguousarray(np.rot90(found, 1, (1, 2))))
    np.testing.assert_allclose(turned, scores, atol=1e-6)
    assert score_crops(model, found[:0]).shape == (0,)


def test_features_are_of_the_middle_of_a_crop() -> None:
    features = CropFeatures(WeakLocaliser(NETWORK)).eval()
    crop = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    outer = crop.clone()
    outer[..., :8] = 0  # a cell of the middle sees less than 32 - 8 px to each side
    inner = crop.clone()
    inner[..., 60:68] = 0
    with torch.no_grad():
        plain, far, near = (features(c) for c in (crop, outer, inner))
    assert plain.shape == (1, features.dim) == (1, 128)
    torch.testing.assert_close(far, plain)
    assert not torch.allclose(near, plain, atol=1e-3)


def test_a_frozen_trunk_is_a_trained_localisers(crops: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    localiser, path = WeakLocaliser(NETWORK), tmp_path / "localiser.pt"
    described = {**localiser.describe(), "mpp": 0.8}
    save_checkpoint(path, model=localiser.state_dict(), config=described, epoch=1)
    settings = {"localiser": str(path), "fine_tune": FineTuneKeys(epochs=0), "target_mpp": 0.5}
    folder = run(crops, tmp_path / "run", **settings)
    model = load_atypical(folder / "checkpoint_best.pt")
    assert model.mpp == 0.8 and model.side == 40
    found = model.features.localiser.state_dict()
    assert all(torch.equal(found[name], value) for name, value in localiser.state_dict().items())
    rows = read_scores(folder)
    assert np.mean([(float(r["score"]) > 0.5) == (r["label"] == "atypical") for r in rows]) > 0.6
    pixels = torch.stack([resize_crop(read_picture(c), 0.8) for c in find_crops(crops, rows)])
    with torch.no_grad():
        scores = model(pixels).softmax(1)[:, 1]
    # the layer of the checkpoint is fitted to all slides, those of the rows each to the others
    assert np.corrcoef(scores, [float(row["score"]) for row in rows])[0, 1] > 0.7
    with pytest.raises(UserError, match="expected an atypical-figure head .* found kind 'weak_loc"):
        load_atypical(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"target_mpp": None}, "expected 0.1 to 2 um per px"), ({"folds": 13}, "as many groups")],
)
def test_what_cannot_be_trained_is_refused(
    crops: Path, tmp_path: Path, keys: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(crops, tmp_path / "no", **keys)
