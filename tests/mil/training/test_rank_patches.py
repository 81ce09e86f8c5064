"""The distillation set: what the original's loader expects, the highest scores, resuming,
failures.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mil.datasets.distillation_set as distillation_set
import mil.rank_patches as rank_patches
from mil.datasets.distillation_set import choose_patches
from mil.rank_patches import Config, main
from mil.training.engine import load_trained_model
from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.writer import write_bag
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError
from wsi_common.processes.pool import run_jobs


def arguments(cohort: Path, output: Path, *more: str) -> list[str]:
    paths = [
        f"labels={cohort}/labels.csv",
        f"features={cohort}/bags",
        f"slides={cohort}/slides",
        f"output={output}",
    ]
    return [
        *paths,
        "device=cpu",
        "subset=train",
        "top_k=4",
        "training.epochs=3",
        "training.min_epochs=1",
        *more,
    ]


def rank(cohort: Path, output: Path, *more: str) -> int:
    return main(load_config(Config, arguments(cohort, output, *more)))


def images(output: Path) -> list[dict]:
    return json.loads((output / "ann_root" / "ann.json").read_text())["images"]


def train_slides(cohort: Path) -> list[str]:
    with (cohort / "labels.csv").open() as stream:
        return [row["slide_id"] for row in csv.DictReader(stream) if row["split"] == "train"]


def test_choose_takes_the_highest_then_random_others():
    scores = np.array([0.1, 0.9, 0.5, 0.9, -1.0, 0.3])
    assert choose_patches(scores, 3, 0, (0,)).tolist() == [1, 3, 2]
    assert choose_patches(scores, 10, 5, (0,)).tolist() == [1, 3, 2, 5, 0, 4]
    more = choose_patches(scores, 2, 3, (0,)).tolist()
    assert more[:2] == [1, 3] and len(set(more)) == 5
    assert more == choose_patches(scores, 2, 3, (0,)).tolist()
    assert len({tuple(choose_patches(scores, 2, 2, (seed,))) for seed in range(20)}) > 3


def test_set_holds_the_top_tiles_with_picture_and_teacher_feature(make_cohort, tmp_path: Path):
    cohort, output = make_cohort(pictures=True), tmp_path / "set"
    assert rank(cohort, output) == 0
    model, _ = load_trained_model(output / "ranker" / "checkpoint_best.pt", torch.device("cpu"))
    annotations = json.loads((output / "ann_root" / "ann.json").read_text())
    assert annotations["annotations"] == [] and annotations["categories"] == []
    slides = train_slides(cohort)
    assert {image["slide_id"] for image in annotations["images"]} == set(slides) and len(
        slides
    ) < 24
    assert sorted(p.name for p in (output / "wsi_root").iterdir()) == sorted(slides)
    assert [image["id"] for image in annotations["images"]] == list(range(1, 4 * len(slides) + 1))
    for slide_id in slides:
        bag = read_bag(cohort / "bags" / "h5_files" / f"{slide_id}.h5")
        with torch.no_grad():
            scores = model.score_tiles(bag.features).numpy()
        mine = [image for image in annotations["images"] if image["slide_id"] == slide_id]
        np.testing.assert_allclose(
            [image["score"] for image in mine], np.sort(scores)[::-1][:4], rtol=1e-5
        )
        assert len(list((output / "wsi_root" / slide_id).iterdir())) == 8
        for image in mine:
            name = f"{image['y'] // 16}_{image['x'] // 16}"
            assert image["file_name"] == f"{slide_id}/{name}.jpg" and image["chosen"] == "top"
            row = bag.coords.tolist().index([image["x"], image["y"]])
            feature = torch.load(output / "wsi_root" / slide_id / f"{name}.pt", weights_only=True)
            assert feature.dtype == torch.float32 and feature.shape == (8,)
            np.testing.assert_array_equal(feature.numpy(), bag.features[row])
            assert (
                feature.untyped_storage().nbytes() == 8 * 4
            )  # the tile's feature, not the bag behind it
            own = cohort / "slides" / slide_id / f"{name}.jpg"
            assert (output / "wsi_root" / image["file_name"]).read_bytes() == own.read_bytes()
            assert (image["width"], image["height"]) == (16, 16)


def test_slide_files_are_cut_and_named_by_corner(make_cohort, tmp_path: Path):
    """Tiles that are not a folder's own are cut; the picture shows the right place."""
    cohort, output = make_cohort(pictures=True), tmp_path / "set"
    for path in (cohort / "bags" / "h5_files").iterdir():
        bag = read_bag(path)
        shifted = bag.attributes | {"patch_size": 8, "patch_size_level0": 8, "target_size": 8}
        shifted.pop("sha256")
        write_bag(path, bag.features, bag.coords + 4, shifted)
    assert rank(cohort, output) == 0
    for image in images(output)[:8]:
        x, y = image["x"], image["y"]
        assert image["file_name"].endswith(f"/{x}_{y}.jpg") and image["width"] == 8
        with Image.open(output / "wsi_root" / image["file_name"]) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (8, 8, 3)
        assert abs(int(pixels.mean()) - 20 * (y // 16 * 4 + x // 16)) <= 2


def test_fewer_tiles_than_k_gives_all_and_extra_ones_are_marked(make_cohort, tmp_path: Path):
    cohort = make_cohort(pictures=True)
    rank(cohort, tmp_path / "all", "top_k=50")
    assert len(images(tmp_path / "all")) == 12 * len(train_slides(cohort))
    rank(cohort, tmp_path / "extra", "extra_random=3")
    chosen = [image["chosen"] for image in images(tmp_path / "extra")]
    assert chosen[:7] == ["top"] * 4 + ["random"] * 3
    keys = {(image["slide_id"], image["x"], image["y"]) for image in images(tmp_path / "extra")}
    assert len(keys) == len(chosen) == 7 * len(train_slides(cohort))


def test_killed_and_restarted_is_the_same_set(
    make_cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cohort = make_cohort(pictures=True)
    rank(cohort, tmp_path / "whole")
    written, original = 0, distillation_set.write_picture

    def dies(*arguments):
        nonlocal written
        written += 1
        if written == 10:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(distillation_set, "write_picture", dies)
    monkeypatch.setattr(
        rank_patches, "run_jobs", lambda work, jobs, *_, **__: run_jobs(work, jobs, workers=0)
    )
    with pytest.raises(KeyboardInterrupt):
        rank(cohort, tmp_path / "parts")
    monkeypatch.undo()
    first = tmp_path / "parts" / "wsi_root" / train_slides(cohort)[0]
    stamps = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert len(stamps) == 8
    assert rank(cohort, tmp_path / "parts") == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in first.iterdir()}
    for name in ("wsi_root", "ann_root"):
        files = sorted(
            p.relative_to(tmp_path / "whole")
            for p in (tmp_path / "whole" / name).rglob("*")
            if p.is_file()
        )
        assert files == sorted(
            p.relative_to(tmp_path / "parts")
            for p in (tmp_path / "parts" / name).rglob("*")
            if p.is_file()
        )
        for file in files:
            assert (tmp_path / "whole" / file).read_bytes() == (
                tmp_path / "parts" / file
            ).read_bytes(), file


def test_a_lost_file_is_written_again(make_cohort, tmp_path: Path):
    cohort = make_cohort(pictures=True)
    rank(cohort, tmp_path / "set")
    lost = tmp_path / "set" / "wsi_root" / images(tmp_path / "set")[5]["file_name"]
    content = lost.read_bytes()
    lost.unlink()
    assert rank(cohort, tmp_path / "set") == 0 and lost.read_bytes() == content


def test_another_k_needs_overwrite_and_leaves_nothing_behind(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cohort = make_cohort(pictures=True)
    rank(cohort, tmp_path / "set", "extra_random=2")
    assert run_script(main, Config, arguments(cohort, tmp_path / "set", "top_k=3")) == 2
    assert "extra_random 2 -> 0, top_k 4 -> 3" in capsys.readouterr().err
    assert rank(cohort, tmp_path / "set", "top_k=3", "overwrite=true") == 0
    assert len(list((tmp_path / "set" / "wsi_root").rglob("*.jpg"))) == 3 * len(
        train_slides(cohort)
    )


def test_someone_elses_folder_is_not_touched(make_cohort, tmp_path: Path):
    cohort = make_cohort(pictures=True)
    (tmp_path / "set" / "wsi_root" / "theirs").mkdir(parents=True)
    with pytest.raises(UserError, match="of unknown origin"):
        rank(cohort, tmp_path / "set", "overwrite=true")
    assert (tmp_path / "set" / "wsi_root" / "theirs").is_dir()


def test_a_broken_slide_and_a_bag_without_corners_are_listed(make_cohort, tmp_path: Path):
    cohort = make_cohort(pictures=True)
    slides = train_slides(cohort)
    for file in (cohort / "slides" / slides[0]).iterdir():
        file.write_bytes(b"not a picture")
    bag = read_bag(cohort / "bags" / "h5_files" / f"{slides[1]}.h5")
    (cohort / "bags" / "h5_files" / f"{slides[1]}.h5").unlink()
    import h5py

    with h5py.File(cohort / "bags" / "h5_files" / f"{slides[1]}.h5", "w") as file:
        file["features"] = bag.features
    assert rank(cohort, tmp_path / "set") == 1
    with (tmp_path / "set" / "failures.csv").open() as stream:
        failed = {row["slide"]: row["error"] for row in csv.DictReader(stream)}
    assert set(failed) == {slides[0], slides[1]}
    assert "cannot be decoded" in failed[slides[0]] and "expected coords" in failed[slides[1]]
    assert {image["slide_id"] for image in images(tmp_path / "set")} == set(slides[2:])


def test_bad_numbers_are_refused(make_cohort, tmp_path: Path):
    with pytest.raises(UserError, match="top_k=0"):
        rank(make_cohort(pictures=True), tmp_path / "set", "top_k=0")
