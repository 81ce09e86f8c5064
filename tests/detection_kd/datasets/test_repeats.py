"""Repeat factors by hand, what an epoch makes of them, and stain jitter of training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from detection_kd.datasets.augmentation_keys import DetectionSizes
from detection_kd.datasets.coco import ImageRecord
from detection_kd.datasets.detection import (
    DetectionDataset,
    draw_epoch_indices,
    find_repeats,
    make_training_loader,
)
from detection_kd.datasets.transforms import JitterStain, make_train_transform
from patch_encoder.stain.augment import HedJitter
from wsi_common.distributed import World
from wsi_common.errors import UserError


def hold(*labels: int, crowd: bool = False) -> ImageRecord:
    boxes = np.array([[0, 0, 9, 9]] * len(labels), np.float32).reshape(-1, 4)
    flags = np.full(len(labels), crowd)
    return ImageRecord(0, Path("a"), 64, 64, boxes, np.array(labels, np.int64), flags)


def test_factors_by_hand() -> None:
    # class 0 in 4 of 5 images, class 1 in 1 of 5; the last one is empty
    records = [hold(0), hold(0, 0), hold(0), hold(0, 1), hold()]
    assert find_repeats(records, 0.0) is None
    found = find_repeats(records, 0.8)
    assert found is not None and found.tolist() == pytest.approx([1, 1, 1, 2, 1])
    assert find_repeats(records, 0.1).tolist() == [1] * 5
    # a crowd region is of no class
    assert find_repeats([*records[:3], hold(1, crowd=True), hold(1)], 0.8)[3] == 1
    with pytest.raises(UserError, match="repeat_threshold=2"):
        find_repeats(records, 2)


def test_an_epoch_repeats_as_often_as_asked_on_average() -> None:
    repeats = np.array([1, 1, 1, 1, 1, 2.5, 1.25, 1])
    counts, lengths = np.zeros(8), set()
    for epoch in range(400):
        numbers = draw_epoch_indices(8, 3, 5, epoch, repeats=repeats)
        lengths.add(len(numbers))
        counts += np.bincount(np.array(numbers) % 8, minlength=8)
        assert len(set(numbers)) == len(numbers)
        assert max(numbers) < 3 * 8  # an image of 2.5 is met three times at most
    assert lengths == {9}  # of 9.75, in batches of 3
    assert np.allclose(counts / 400 / repeats, 9 / 9.75, atol=0.06)


def test_without_repeats_an_epoch_is_what_it_was() -> None:
    plain = draw_epoch_indices(10, 4, 3, 1)
    assert sorted(plain) == sorted(set(plain)) and len(plain) == 8
    ones = draw_epoch_indices(10, 4, 3, 1, repeats=np.ones(10))
    assert sorted(set(ones)) == sorted(ones) and max(ones) < 10


def test_processes_share_an_epoch_of_repeats() -> None:
    repeats = np.array([1, 3, 1, 1.5])
    whole = draw_epoch_indices(4, 2, 0, 7, repeats=repeats)
    parts = [draw_epoch_indices(4, 2, 0, 7, rank, 2, repeats) for rank in range(2)]
    assert [n for pair in zip(*parts, strict=True) for n in pair] == whole


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    pixels = np.random.default_rng(0).integers(60, 220, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    boxes, labels = np.array([[4, 4, 30, 30]], np.float32), np.zeros(1, np.int64)
    return [ImageRecord(0, tmp_path / "a.png", 64, 64, boxes, labels, np.zeros(1, bool))]


def test_a_repeat_of_an_image_is_augmented_anew(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, make_train_transform([40, 48, 56, 64], 64), seed=1)
    samples = [dataset[number] for number in range(8)]
    assert {sample.index for sample in samples} == {0}
    assert len({tuple(sample.image.shape) for sample in samples}) > 1
    assert torch.equal(dataset[3].image, samples[3].image)


def test_stain_is_hed_jitter_of_the_pixels_alone(records: list[ImageRecord]) -> None:
    image = tv_tensors.Image(torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(16, 16))
    torch.manual_seed(4)
    jittered, same = JitterStain(0.2)(image, boxes)
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    assert torch.equal(jittered, HedJitter(0.2, 0.2)(image.as_subclass(torch.Tensor), generator))
    assert not torch.equal(jittered, image) and torch.equal(same, boxes)

    def first(stain: float) -> torch.Tensor:
        sizes = DetectionSizes(sizes=[64], max_size=64, crop_sizes=[], stain=stain)
        world = World(0, 1, torch.device("cpu"))
        options = {"batch_size": 1, "share": 1, "seed": 0, "epoch": 0, "workers": 0}
        (batch,) = make_training_loader(records, sizes, world, **options)
        return batch.images

    assert not torch.equal(first(0.0), first(0.2))
    assert torch.equal(first(0.2), first(0.2))
    with pytest.raises(UserError, match="stain"):
        first(1.5)
