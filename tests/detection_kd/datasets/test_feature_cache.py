"""The cache of a frozen backbone's features: the same numbers, shared by runs, never half a file,
never another set's.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd import train_d2vfm
from detection_kd.datasets import feature_cache
from detection_kd.datasets.distillation import DistillationTiles, read_pairs
from detection_kd.datasets.feature_cache import CachedMaps, join_batch
from detection_kd.models.backbone import load_backbone
from detection_kd.models.student import FrozenMaps, Student, load_student
from tests.detection_kd.d2vfm_runs import DIM, train

STILL = ("augment=false", "scales=[1.0]", "epochs=1")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles that went through a frozen backbone, batch by batch."""
    sizes: list[int] = []
    forward = FrozenMaps.forward

    def counting(self: FrozenMaps, pixels: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(FrozenMaps, "forward", counting)
    return sizes


def cached(*args: object) -> int:
    return train(*args[:3], *STILL, "cache=true", *args[3:])


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "d2vfm_cache").glob("*.npy"))


@pytest.mark.parametrize(
    "switch",
    [["pooling=attention"], ["pooling=gem", "stages=[0,1]"], ["stages=[0,1]", "adapter=ln"]],
)
def test_cached_training_is_training_on_tiles(
    switch: list[str], pairs_root: Path, backbone_path: Path, tmp_path: Path
) -> None:
    assert train(pairs_root, backbone_path, tmp_path / "tiles", *STILL, *switch) == 0
    assert cached(pairs_root, backbone_path, tmp_path / "cached", *switch) == 0
    tiles, from_cache = (
        load_student(tmp_path / name / "checkpoint_best.pt")[0].state_dict()
        for name in ("tiles", "cached")
    )
    assert tiles.keys() == from_cache.keys()
    assert all(
        torch.allclose(tiles[name], from_cache[name], rtol=1e-3, atol=1e-4) for name in tiles
    )


def test_rows_are_what_the_backbone_gives(
    pairs_root: Path, backbone_path: Path, tmp_path: Path
) -> None:
    assert (
        cached(
            pairs_root,
            backbone_path,
            tmp_path / "run",
            "stages=[0,1]",
            "cached_turns=2",
            "input_scale=0.75",
        )
        == 0
    )
    pairs = read_pairs(pairs_root)
    student = Student(load_backbone(backbone_path)[0], [0, 1], "mpa", DIM, 0.75).eval()
    assert len(files(tmp_path)) == 4
    for turn in (0, 1):
        tiles = DistillationTiles(pairs, augment=False, seed=0, turns=turn)
        expected = FrozenMaps(student).eval()(torch.stack([tiles[i][0] for i in range(24)]))
        for stage in (0, 1):
            (path,) = (tmp_path / "d2vfm_cache").glob(f"*_turn{turn}_stage{stage}.npy")
            assert np.allclose(np.load(path), expected[stage].numpy(), atol=1e-5)
            assert json.loads(path.with_suffix(".json").read_text())["input_scale"] == 0.75


def test_items_are_turn_by_turn_and_batches_are_items() -> None:
    turns = [
        [
            np.random.default_rng(t).normal(size=(5, 3, 2, 2)).astype(np.float16),
            np.full((5, 4, 1, 1), t, np.float32),
        ]
        for t in range(2)
    ]
    teacher = torch.arange(5.0)[:, None]
    tiles = CachedMaps(turns, teacher, rows=[4, 0, 2])
    assert len(tiles) == 6
    for index, (turn, row) in enumerate([(0, 4), (0, 0), (0, 2), (1, 4), (1, 0), (1, 2)]):
        (first, second), feature = tiles[index]
        assert first.dtype == torch.float32 and np.array_equal(
            first.numpy(), turns[turn][0][row].astype(np.float32)
        )
        assert (second == turn).all() and feature == row
    maps, features = join_batch(tiles.__getitems__([5, 0, 4]))
    assert features.flatten().tolist() == [2, 4, 0] and maps[1].flatten(1)[:, 0].tolist() == [
        1,
        0,
        1,
    ]
    assert torch.equal(maps[0][1], tiles[0][0][0])


def test_other_runs_share_the_files(
    pairs_root: Path, backbone_path: Path, tmp_path: Path, counted: list[int]
) -> None:
    probes = feature_cache.PROBES
    assert cached(pairs_root, backbone_path, tmp_path / "first") == 0
    assert counted == [probes, 24]
    stamps = [path.stat().st_mtime_ns for path in files(tmp_path)]
    counted.clear()
    others = ["adapter=ln", "loss=cosine", "seed=7", "ema=0.9", "val_fraction=0.5"]
    assert cached(pairs_root, backbone_path, tmp_path / "second", *others) == 0
    assert counted == [probes] and [path.stat().st_mtime_ns for path in files(tmp_path)] == stamps
    counted.clear()
    assert (
        cached(
            pairs_root, backbone_path, tmp_path / "more stages", "stages=[0,1]", "cached_turns=2"
        )
        == 0
    )
    assert counted == [probes, probes, 24, 24] and len(files(tmp_path)) == 4
    assert files(tmp_path)[1].stat().st_mtime_ns == stamps[0], "stage 1 of turn 0 was there"


@pytest.mark.parametrize(
    "setting", ["pooling=gem", "cache_dtype=float16", "input_scale=0.5", "precision=bf16"]
)
def test_what_changes_the_numbers_changes_the_name(
    setting: str, pairs_root: Path, backbone_path: Path, tmp_path: Path
) -> None:
    assert cached(pairs_root, backbone_path, tmp_path / "first") == 0
    assert cached(pairs_root, backbone_path, tmp_path / "second", setting) == 0
    assert len(files(tmp_path)) == 2
    assert {np.load(path).dtype for path in files(tmp_path)} == {np.dtype("float32")} | (
        {np.dtype("float16")} if "float16" in setting else set()
    )


@pytest.mark.parametrize("fault", ["cut short", "another shape", "not finished", "other pixels"])
def test_files_that_do_not_fit_are_made_again(
    fault: str, pairs_root: Path, backbone_path: Path, tmp_path: Path, counted: list[int]
) -> None:
    assert cached(pairs_root, backbone_path, tmp_path / "first") == 0
    (path,) = files(tmp_path)
    good = path.read_bytes()
    if fault == "cut short":
        path.write_bytes(good[:-100])
    elif fault == "another shape":
        np.save(path, np.zeros((24, 3, 1, 1), np.float32))
    elif fault == "not finished":
        path.rename(path.with_name(f".{path.name}.elsewhere.1.tmp"))
    else:
        for tile in pairs_root.rglob("*.jpg"):
            inverted = 255 - np.asarray(Image.open(tile))
            Image.fromarray(inverted).save(tile, quality=95)
    counted.clear()
    assert cached(pairs_root, backbone_path, tmp_path / "second") == 0
    assert counted == [feature_cache.PROBES, 24]
    assert (files(tmp_path)[0].read_bytes() == good) == (fault != "other pixels")


def test_a_kill_on_the_way_leaves_no_file(
    pairs_root: Path, backbone_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "barrier", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cached(pairs_root, backbone_path, tmp_path / "run")
    assert list((tmp_path / "d2vfm_cache").iterdir()) == []


def test_a_full_disk_is_one_line(
    pairs_root: Path,
    backbone_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert cached(pairs_root, backbone_path, tmp_path / "r") == 2
    assert "set cache_dir=" in capsys.readouterr().err

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert cached(pairs_root, backbone_path, tmp_path / "r") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert list((tmp_path / "d2vfm_cache").iterdir()) == []


def test_numbers_that_float16_cannot_hold_are_said(
    pairs_root: Path,
    backbone_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = FrozenMaps.forward
    monkeypatch.setattr(
        FrozenMaps, "forward", lambda self, pixels: [x * 0 + 1e5 for x in forward(self, pixels)]
    )
    assert cached(pairs_root, backbone_path, tmp_path / "r", "cache_dtype=float16") == 2
    assert "set cache_dtype=float32" in capsys.readouterr().err
    assert cached(pairs_root, backbone_path, tmp_path / "fits") == 0


def test_cache_dir_is_where_it_lies(pairs_root: Path, backbone_path: Path, tmp_path: Path) -> None:
    assert (
        cached(pairs_root, backbone_path, tmp_path / "run", f"cache_dir={tmp_path}/elsewhere") == 0
    )
    assert len(list((tmp_path / "elsewhere").glob("*.npy"))) == 1 and not files(tmp_path)
    assert train_d2vfm.Config.__dataclass_fields__["cache_dir"].metadata["runtime"]
