"""Batches of an epoch: every patch in its order, on one process, on two, and with workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd.graded_patches import patch_pixels
from detection_kd.graded_patches.labelled_tiles import read_labelled_tiles
from detection_kd.graded_patches.patch_augmentation import PatchAugmentationKeys, augment_patches
from detection_kd.graded_patches.patch_loader import PatchBatch, make_patch_loader
from detection_kd.graded_patches.patch_pixels import PatchPixels
from wsi_common.distributed import World
from wsi_common.sampling import balance_epoch

ONE = World(0, 1, torch.device("cpu"))
KEYS = PatchAugmentationKeys(rotation=10, colour=0.1)


@pytest.fixture
def pixels(tmp_path: Path) -> PatchPixels:
    """Nine patches whose grey level is their number; three of the higher grade."""
    for number in range(9):
        folder = tmp_path / ("high" if number % 3 == 2 else "low")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 100, 100)).save(folder / f"{number}.png")
    return PatchPixels(read_labelled_tiles(tmp_path, ["low", "high"]), 8)


def load(pixels: PatchPixels, world: World = ONE, **settings: int) -> list[PatchBatch]:
    order = balance_epoch(pixels.patches.labels, seed=4, epoch=1, multiple=4)
    return list(make_patch_loader(pixels, order, 4, world, seed=4, epoch=1, **settings))


def test_every_patch_comes_with_its_grade_and_rare_grades_come_again(pixels: PatchPixels):
    batches = load(pixels)
    assert [len(batch.labels) for batch in batches] == [4, 4, 4]
    samples = np.concatenate([batch.draws.samples for batch in batches])
    assert set(samples.tolist()) == set(range(9))
    labels = torch.cat([batch.labels for batch in batches])
    assert torch.bincount(labels).tolist() == [6, 6]
    assert np.array_equal(labels.numpy(), pixels.patches.labels[samples])
    numbers = torch.cat([batch.pixels[:, 0, 0, 0] for batch in batches]) // 20
    names = [int(pixels.patches.patches[sample].path.stem) for sample in samples]
    assert numbers.tolist() == names
    repeats = np.concatenate([batch.draws.repeats for batch in batches])
    assert sorted(repeats[labels.numpy() == 1].tolist()) == [0, 0, 0, 1, 1, 1]


def test_two_processes_load_and_augment_what_one_does(pixels: PatchPixels):
    whole = load(pixels)
    halves = [load(pixels, World(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        wanted = augment_patches(batch.pixels, batch.draws, KEYS)
        for rank, half in enumerate(halves):
            found = augment_patches(half[step].pixels, half[step].draws, KEYS)
            assert torch.allclose(found, wanted[rank::2], atol=1e-6)


@pytest.mark.process
def test_workers_change_nothing(pixels: PatchPixels, monkeypatch: pytest.MonkeyPatch):
    kept = load(pixels)
    monkeypatch.setattr(patch_pixels, "KEPT_BYTES", 1)
    read = load(PatchPixels(pixels.patches, 8), workers=2)
    for ours, theirs in zip(kept, read, strict=True):
        assert torch.equal(ours.pixels, theirs.pixels) and torch.equal(ours.labels, theirs.labels)
        assert np.array_equal(ours.draws.samples, theirs.draws.samples)
