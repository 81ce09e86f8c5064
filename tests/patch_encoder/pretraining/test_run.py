"""What a run of pre-training leaves, and what later stages and the next start make of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from patch_encoder import pretrain_dino
from patch_encoder.models.encoder_table import EFFICIENTNET_LITE, IMAGENET
from patch_encoder.models.encoders import build_encoder
from patch_encoder.pretraining.run_files import write_description, write_epoch_log
from patch_encoder.pretraining.state import keep_predecessor, predecessor, read_newest
from patch_encoder.tile_stream.reader import TileReader
from tests.training_rows import slides_inputs
from wsi_common.checkpoint import save_checkpoint
from wsi_common.cli import Terminated, run
from wsi_common.config import load_config
from wsi_common.errors import DamagedFile, UserError

SHORT = ("epochs=2", "epoch_tiles=16")


def start(arguments: list[str], output: Path, *more: str) -> int:
    given = [*arguments, *SHORT, *more, f"output={output}"]
    return run(pretrain_dino.main, pretrain_dino.Config, given)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return slides_inputs(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled pictures: light and dark ones."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 180)):
        (folder / label).mkdir()
        for number in range(12):
            pixels = level + rng.integers(0, 60, (40, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: list[str], pictures: Path) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    more = ("dino_checkpoint=true", "keep_start=true", f"probe.tile_set={pictures}")
    assert start(corpus, output, *more, "mpps=[1.0]") == 0
    return output


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_the_backbone_is_the_teachers_and_an_encoder(finished: Path) -> None:
    weights, last = read(finished / "backbone.pt"), read(finished / "checkpoint_last.pt")
    for name, value in weights.items():
        torch.testing.assert_close(last["teacher"][f"backbone.{name}"], value, rtol=0, atol=0)
    tile = np.random.default_rng(1).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    found = {}
    for place in (finished, finished / "backbone.pt", finished / "backbone_start.pt"):
        encoder = build_encoder("dino", str(place))
        assert (encoder.mpp, encoder.tile) == (1.0, 32)
        item = encoder.transform(tile)
        assert item.shape == (3, 32, 32)  # what the network was trained on
        found[place] = encoder.model(item[None])[0]
        assert found[place].shape == (encoder.dim,)
    trained, same, untrained = found.values()
    assert torch.equal(trained, same) and not torch.allclose(trained, untrained)


def test_dinos_own_layout_holds_student_teacher_and_centre(finished: Path) -> None:
    full, last = read(finished / "full_checkpoint.pth"), read(finished / "checkpoint_last.pt")
    assert full["student"].keys() == {f"module.{name}" for name in last["model"]}
    assert full["teacher"].keys() == last["teacher"].keys()
    assert full["dino_loss"]["center"].shape == (1, 64) and full["epoch"] == 2
    features = [
        build_encoder("timm:test_vit", f"{finished}/full_checkpoint.pth#{part}").provenance
        for part in ("student", "teacher")
    ]
    assert features[0]["weights_sha256"] != features[1]["weights_sha256"]


def test_logs_are_those_of_the_public_code(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.txt").read_text().splitlines()]
    assert [line.keys() for line in lines] == [
        {"train_loss", "train_lr", "train_wd", "epoch"}
    ] * 2 and [line["epoch"] for line in lines] == [0, 1]
    settings = (finished / "args.txt").read_text().splitlines()
    assert "batch_size: 8" in settings and "network.arch: timm:test_vit" in settings
    assert settings == sorted(settings, key=lambda line: line.split(":")[0])


def test_the_probe_is_logged_and_keeps_the_best_backbone(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    scores = [line["knn_balanced_accuracy"] for line in lines if "step" not in line]
    results = json.loads((finished / "results.json").read_text())
    assert len(scores) == 2 and max(scores) > 0.9
    assert results["best"]["knn_balanced_accuracy"] == max(scores)
    assert results["best"]["epoch"] == 1 + scores.index(max(scores))
    assert (finished / "backbone_best.pt").is_file()


def test_no_predecessor_is_left_of_a_finished_run(finished: Path) -> None:
    assert not predecessor(finished / "checkpoint_last.pt").exists()


def test_a_run_that_is_told_to_end_writes_a_checkpoint_first(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "epoch_tiles=48"
    assert start(corpus, tmp_path / "whole", more) == 0
    cut_views = pretrain_dino.cut_views

    def cut_and_tell(job: Any, batch: Any, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return cut_views(job, batch, step)

    with monkeypatch.context() as patch, pytest.raises(Terminated):
        patch.setattr(pretrain_dino, "cut_views", cut_and_tell)
        start(corpus, tmp_path / "run", more)
    assert read(tmp_path / "run" / "checkpoint_last.pt")["step"] == 3
    assert start(corpus, tmp_path / "run", more) == 0
    whole, resumed = (read(tmp_path / name / "backbone.pt") for name in ("whole", "run"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_damaged_checkpoint_gives_way_to_its_predecessor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = tmp_path / "checkpoint_last.pt"
    for epoch in (1, 2):
        keep_predecessor(last)
        save_checkpoint(last, model={}, config={}, epoch=epoch)
    assert read_newest(last)["epoch"] == 2
    half = last.read_bytes()[:100]
    last.unlink()  # the two are names of one file until the next one is written
    last.write_bytes(half)
    assert read_newest(last)["epoch"] == 1 and "checkpoint before it" in caplog.text
    last.unlink()
    assert read_newest(last)["epoch"] == 1
    predecessor(last).unlink()
    assert read_newest(last) == {}
    last.write_bytes(b"no checkpoint")
    with pytest.raises(DamagedFile):
        read_newest(last)


def test_a_preview_draws_and_trains_nothing(corpus: list[str], tmp_path: Path) -> None:
    sizes = []
    for count in (3, 12):  # a batch has eight tiles
        output = tmp_path / f"{count}"
        assert start(corpus, output, f"preview={count}", "pyramid.factor=2") == 0
        assert [path.name for path in output.iterdir()] == ["views.png"]
        with Image.open(output / "views.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] > 400 and sizes[1][1] > 3 * sizes[0][1]


def test_a_preview_reads_no_more_tiles_than_it_draws(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, plain = [], TileReader.read

    def count(reader: TileReader, indices: Sequence[int], out: Sequence[np.ndarray]) -> Any:
        read.extend(indices)
        return plain(reader, indices, out)

    monkeypatch.setattr(TileReader, "read", count)
    keys = ("batch_size=512", "epoch_tiles=512", "preview=2", "workers=0")
    assert start(corpus, tmp_path / "run", *keys) == 0
    assert sorted(read) == [0, 1]


def test_another_cohort_is_refused(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert start(corpus, output) == 0
    (output / "results.json").unlink()
    root = Path(corpus[0].removeprefix("slides="))
    moved = root.parent / "one.tiff"
    (root / "site0" / "s0.tiff").rename(moved)
    try:
        assert start(corpus, output) == 2
    finally:
        moved.rename(root / "site0" / "s0.tiff")
    error = capsys.readouterr().err
    assert "another run: inputs.slides" in error and len(error.splitlines()) == 1


def test_a_slide_without_corners_is_listed_and_the_status_says_so(
    corpus: list[str], tmp_path: Path
) -> None:
    root = Path(corpus[0].removeprefix("slides="))
    corners, aside = root / "site1" / "s1.npy", root.parent / "s1.npy"
    corners.rename(aside)
    try:
        assert start(corpus, tmp_path / "run") == 1
    finally:
        aside.rename(corners)
    assert "site1/s1" in (tmp_path / "run" / "failures.csv").read_text()
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("shuffle.grid=5", "shuffle.grid=5: expected squares"),
        ("network.arch=vit_huge", "arch=vit_huge: no such network"),
        ("network.registers=4", "registers=4: expected a ViT"),
        ("batch_size=7", None),
        ("views.preset=dyno", "preset"),
        ("epoch_tiles=4", "epoch_tiles=4: expected at least batch_size=8"),
        ("accumulate=3", "expected a multiple of the 1 processes times accumulate=3"),
        ("network.init=nowhere.pt", "init=nowhere.pt: expected random, a weights file"),
        ("mpps=[0.1]", "0.1"),
        ("log_every=0", "key 'log_every': expected at least 1, found 0"),
        ("probe.every=0", "key 'probe.every': expected at least 1, found 0"),
        ("training.warmup=2", "training.warmup=2: expected fewer epochs than epochs=2"),
        ("training.lr=-1", "key 'training.lr': expected at least 0"),
        ("training.clip_norm=-1", "key 'training.clip_norm': expected at least 0"),
        ("network.out_dim=1", "key 'network.out_dim': expected at least 2"),
        ("network.patch_size=0", "key 'network.patch_size': expected at least 1"),
        ("network.drop_path=1.5", "drop_path=1.5: expected a share below 1"),
        ("objective.centre_momentum=2", "objective.centre_momentum=2: expected a share"),
        ("tile_size=-3", "key 'tile_size': expected at least 1, found -3"),
        ("batch_size=1", "key 'batch_size': expected at least 2, found 1"),
        ("preview=33", "preview=33: expected at most 32 tiles"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    corpus: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    said: str | None,
) -> None:
    status = start(corpus, tmp_path / "run", setting)
    if said is None:
        assert status == 0
        return
    error = capsys.readouterr().err
    assert status == 2 and said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


def test_a_schedule_that_cannot_be_leaves_the_folder_to_the_next_try(
    corpus: list[str], tmp_path: Path
) -> None:
    assert start(corpus, tmp_path / "run", "training.warmup=2") == 2
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_description_that_is_none_is_one_line(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "backbone.pt").write_bytes((finished / "backbone.pt").read_bytes())
    (tmp_path / "encoder.json").write_text('{"model": "test_vit"}')
    with pytest.raises(UserError, match="expected a description of an encoder"):
        build_encoder("dino", str(tmp_path))


def test_the_epoch_log_leaves_single_steps_out(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"epoch": 1, "step": 0, "loss": 3}\n{"epoch": 1, "loss": 2, "lr": 0.1}\n')
    write_epoch_log(tmp_path / "log.txt", metrics)
    assert json.loads((tmp_path / "log.txt").read_text()) == {
        "train_loss": 2,
        "train_lr": 0.1,
        "epoch": 0,
    }


def test_views_have_the_statistics_of_the_weights_that_training_starts_from(
    corpus: list[str],
) -> None:
    config = load_config(pretrain_dino.Config, [*corpus, "output=."])
    assert config.make_recipe().mean == IMAGENET[0]
    config.network.arch, config.network.init = "timm:tf_efficientnet_lite0", "imagenet_lite0"
    recipe = config.make_recipe()
    assert (recipe.mean, recipe.std) == EFFICIENTNET_LITE


def test_a_run_that_starts_from_another_one_keeps_its_statistics(
    corpus: list[str], tmp_path: Path
) -> None:
    (tmp_path / "backbone.pt").touch()
    sizes = (64, 32, EFFICIENTNET_LITE, 32, None)
    write_description(tmp_path / "encoder.json", "test_vit", {}, *sizes)
    config = load_config(pretrain_dino.Config, [*corpus, "output=."])
    for init in (tmp_path, tmp_path / "backbone.pt"):
        config.network.init = str(init)
        recipe = config.make_recipe()
        assert (recipe.mean, recipe.std) == EFFICIENTNET_LITE


def test_a_probe_needs_pictures(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = tmp_path / "places.csv"
    places.write_text("slide_id,x,y,label\ns0,0,0,a\ns1,0,0,b\n")
    assert start(corpus, tmp_path / "run", f"probe.tile_set={places}") == 2
    assert "expected pictures, found places on slides" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("few", "expected two classes or more with at least 5 groups each, found 2 with 4"),
        ("broken", "7.png: expected a picture"),
    ],
)
def test_pictures_that_cannot_be_probed_are_refused_before_the_training(
    corpus: list[str],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    said: str,
) -> None:
    copy = Path(shutil.copytree(pictures, tmp_path / name))
    if name == "few":
        for number in range(8):
            (copy / "dark" / f"{number}.png").unlink()
    else:
        (copy / "light" / "7.png").write_bytes(b"no picture")
    assert start(corpus, tmp_path / "run", f"probe.tile_set={copy}") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.process
def test_a_compiled_network_trains(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one block in place of six: each is compiled anew, in seconds
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=1))
    losses = []
    for name in ("plain", "compiled"):
        # without local views there is one size, which is compiled once
        more = ("views.local_number=0", *("compile=true",) * (name == "compiled"))
        assert start(corpus, tmp_path / name, "epochs=1", *more) == 0
        losses.append(json.loads((tmp_path / name / "results.json").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (
        read(tmp_path / "plain" / "backbone.pt").keys()
        == read(tmp_path / "compiled" / "backbone.pt").keys()
    )
