"""Annotation files, transforms, batches and COCO metrics of the detector."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from detection_kd.datasets.coco import DetectionSet, ImageRecord, read_coco, same_categories
from detection_kd.datasets.detection import (
    DetectionDataset,
    collate,
    draw_epoch_indices,
    make_loader,
)
from detection_kd.datasets.transforms import make_eval_transform, make_train_transform
from detection_kd.evaluation.coco_metrics import Prediction, average_precision
from detection_kd.evaluation.froc import compute_froc
from wsi_common.errors import UserError


def write_coco(folder: Path, **changes: Any) -> Path:
    """Two 40 x 30 px images; the first has a box of category 9, the second none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), (200, 100, 50)).save(folder / name)
    content = {
        "images": [
            {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [annotation()],
        "categories": [{"id": 9, "name": "HSIL"}, {"id": 2, "name": "ASC"}],
    } | changes
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def annotation(bbox: list[float] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "image_id": 5,
        "category_id": 9,
        "bbox": bbox or [4, 6, 10, 8],
        "iscrowd": 0,
    } | changes


def test_images_without_boxes_are_kept_and_ids_become_classes(tmp_path: Path) -> None:
    found = read_coco(write_coco(tmp_path), tmp_path)
    assert found.categories == ["ASC", "HSIL"]
    assert [record.id for record in found.images] == [5, 3]
    assert found.images[0].boxes.tolist() == [[4, 6, 14, 14]] and found.images[
        0
    ].labels.tolist() == [1]
    assert found.images[1].boxes.shape == (0, 4)


def test_class_agnostic_makes_one_class(tmp_path: Path) -> None:
    path = write_coco(tmp_path, annotations=[annotation(), annotation(category_id=2)])
    found = read_coco(path, tmp_path, class_agnostic=True)
    assert found.categories == ["lesion"] and found.images[0].labels.tolist() == [0, 0]


def test_boxes_are_clipped_and_useless_ones_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [
        [-5, -5, 10, 10],
        [30, 20, 100, 100],
        [50, 0, 5, 5],
        [0, -9, 5, 9],
        [3, 3, 0, 5],
        [3, 3, -2, 5],
        [0, 0, 40, 30],
    ]
    path = write_coco(tmp_path, annotations=[annotation(box) for box in boxes])
    with caplog.at_level(logging.INFO):
        found = read_coco(path, tmp_path)
    assert found.images[0].boxes.tolist() == [[0, 0, 5, 5], [30, 20, 40, 30], [0, 0, 40, 30]]
    assert [
        record.getMessage() for record in caplog.records if "dropped" in record.getMessage()
    ] == [f"{path}: dropped 4 of 7 boxes: no area inside their image"]


BAD = {
    "no annotation": ({"annotations": []}, "expected annotated boxes, found none in 2 images"),
    "crowds only": (
        {"annotations": [annotation(iscrowd=1)]},
        "expected annotated boxes, found none",
    ),
    "boxes outside only": (
        {"annotations": [annotation([100, 100, 5, 5])]},
        "expected annotated boxes, found none",
    ),
    "unknown image": (
        {"annotations": [annotation(image_id=7)]},
        "annotation 1: image_id 7 is not among",
    ),
    "unknown category": (
        {"annotations": [annotation(category_id=7)]},
        r"annotation 1: category_id 7 .* \[2, 9\]",
    ),
    "NaN": ({"annotations": [annotation([float("nan"), 0, 5, 5])]}, r"annotation 1: expected bbox"),
    "infinity": (
        {"annotations": [annotation([0, 0, float("inf"), 5])]},
        r"annotation 1: expected bbox",
    ),
    "three numbers": ({"annotations": [annotation([0, 0, 5])]}, r"annotation 1: expected bbox"),
    "text for a box": ({"annotations": [annotation(bbox="wide")]}, "annotation 1: expected"),
    "no box": (
        {"annotations": [{"id": 1, "image_id": 5, "category_id": 9}]},
        "annotation 1: expected image_id, category_id, bbox",
    ),
    "not a dict": ({"annotations": ["x"]}, "annotation 'x': expected image_id"),
    "missing file": (
        {"images": [{"id": 5, "file_name": "c.png", "width": 4, "height": 3}]},
        "1 of 1 image files are missing, first .*c.png",
    ),
    "no size": (
        {"images": [{"id": 5, "file_name": "a.png"}]},
        "expected images with id, file_name, width, height",
    ),
    "empty image": (
        {"images": [{"id": 5, "file_name": "a.png", "width": 0, "height": 3}]},
        "expected a size, found 0 x 3",
    ),
    "image id twice": (
        {"images": [{"id": 5, "file_name": "a.png", "width": 40, "height": 30}] * 2},
        "unique image ids, found 5 twice",
    ),
    "category id twice": (
        {"categories": [{"id": 9, "name": "x"}, {"id": 9, "name": "y"}]},
        "categories with unique ids",
    ),
    "no category": ({"categories": []}, "categories with unique ids"),
    "nameless category": ({"categories": [{"id": 9}]}, "categories with id and name"),
    "images no list": ({"images": None}, "'images' is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_are_one_line_errors(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        read_coco(write_coco(tmp_path, **changes), tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_json_and_unreadable_images_are_user_errors(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="expected COCO annotations as JSON"):
        read_coco(tmp_path / "broken.json", tmp_path)
    records = read_coco(path, tmp_path).images
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"a\.png: expected an image, cannot be read"):
        DetectionDataset(records, make_eval_transform(30, 40))[0]
    Image.new("RGB", (20, 30)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="expected 40 x 30 px as annotated, found 20 x 30 px"):
        DetectionDataset(records, make_eval_transform(30, 40))[1]


def test_validation_needs_the_training_categories() -> None:
    with pytest.raises(UserError, match=r"expected the training categories \['a'\], found \['b'\]"):
        same_categories(DetectionSet([], ["a"]), DetectionSet([], ["b"]))


def objects(folder: Path) -> ImageRecord:
    """A black 160 x 120 px image with two bright rectangles: red (class 0) and green (class 1),
    exactly boxed; one crowd.
    """
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[20:50, 30:90, 0] = 255
    pixels[70:110, 100:130, 1] = 255
    Image.fromarray(pixels).save(folder / "objects.png")
    boxes = np.array([[30, 20, 90, 50], [100, 70, 130, 110], [0, 0, 160, 120]], np.float32)
    return ImageRecord(
        1,
        folder / "objects.png",
        160,
        120,
        boxes,
        np.array([0, 1, 0]),
        np.array([False, False, True]),
    )


@pytest.mark.parametrize("crop", [(), (90, 120)], ids=["resize", "crop"])
def test_boxes_stay_on_their_objects(tmp_path: Path, crop: tuple[int, ...]) -> None:
    transform = make_train_transform(
        [100, 140], 180, crop_sizes=crop, crop_range=(60, 100), symmetry=True
    )
    sizes = set()
    for epoch in range(12):
        sample = DetectionDataset([objects(tmp_path)], transform, seed=1, epoch=epoch)[0]
        _, height, width = sample.image.shape
        sizes.add((height, width))
        for box, label in zip(sample.boxes, sample.labels):
            y, x = torch.nonzero(sample.image[int(label)] > 127, as_tuple=True)
            cx, cy, w, h = box * torch.tensor([width, height, width, height])
            found = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1))
            expected = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
            assert (found - expected).abs().max() <= 1.5, (epoch, found, expected)
        assert len(sample.boxes) == 2 or crop
    assert {(100, 133), (133, 100)} <= sizes if not crop else len(sizes) > 6


def test_the_eight_symmetries_all_occur(tmp_path: Path) -> None:
    transform = make_train_transform([120], 160, symmetry=True)
    record = objects(tmp_path)
    first = {
        tuple(
            DetectionDataset([record], transform, epoch=epoch)[0]
            .boxes[0]
            .round(decimals=2)
            .tolist()
        )
        for epoch in range(60)
    }
    assert len(first) == 8
    upright = make_train_transform([120], 160)
    assert (
        len(
            {
                tuple(
                    DetectionDataset([record], upright, epoch=e)[0]
                    .boxes[0]
                    .round(decimals=2)
                    .tolist()
                )
                for e in range(30)
            }
        )
        == 2
    )


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    record, transform = (
        objects(tmp_path),
        make_train_transform([100, 140], 180, crop_sizes=(90, 120), crop_range=(60, 100)),
    )

    def sample(seed: int, epoch: int) -> torch.Tensor:
        torch.rand(epoch + 3)  # whatever was drawn before
        return DetectionDataset([record], transform, seed, epoch)[0].image

    assert torch.equal(sample(1, 4), sample(1, 4))
    assert (
        len(
            {sample(1, epoch).float().sum().item() for epoch in range(6)}
            | {sample(2, 0).float().sum().item()}
        )
        > 4
    )


def test_workers_see_the_same_batches(tmp_path: Path) -> None:
    dataset = DetectionDataset([objects(tmp_path)] * 4, make_train_transform([60, 80], 120), seed=3)
    alone, by_workers = (
        [b.images for b in make_loader(dataset, [2, 0, 3, 1], 2, workers=n)] for n in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, by_workers, strict=True))


def test_collate_pads_right_and_below(tmp_path: Path) -> None:
    record = objects(tmp_path)
    samples = [DetectionDataset([record], make_eval_transform(size, 200))[0] for size in (30, 60)]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 60, 80)
    assert (
        not batch.padding[0, :30, :40].any()
        and batch.padding[0, 30:].all()
        and batch.padding[0, :, 40:].all()
    )
    assert not batch.padding[1].any()
    assert (
        torch.equal(batch.images[0, :, :30, :40], samples[0].image)
        and not batch.images[0, :, 30:].any()
    )
    assert collate(samples, pad_to=96).images.shape == (2, 3, 96, 96)


def test_batches_are_normalised_on_their_device_as_torchvision_does(tmp_path: Path) -> None:
    record = objects(tmp_path)
    batch = collate(
        [DetectionDataset([record], make_eval_transform(size, 200))[0] for size in (30, 60)]
    )
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    expected = F.normalize(batch.images / 255, mean, std)
    expected[0, :, 30:], expected[0, :, :, 40:] = 0, 0
    placed = batch.to(torch.device("cpu"))
    assert batch.images.dtype == torch.uint8 and placed.images.dtype == torch.float32
    torch.testing.assert_close(placed.images, expected)
    assert placed.images.is_contiguous(memory_format=torch.channels_last)


def test_processes_share_each_global_batch() -> None:
    one = draw_epoch_indices(11, 4, seed=1, epoch=2)
    two = [draw_epoch_indices(11, 4, seed=1, epoch=2, rank=rank, processes=2) for rank in range(2)]
    assert len(one) == len(set(one)) == 8  # the rest does not fill a batch
    for step in range(2):
        assert set(one[step * 4 : step * 4 + 4]) == {
            i for share in two for i in share[step * 2 : step * 2 + 2]
        }
    assert one != draw_epoch_indices(11, 4, seed=1, epoch=3)


def annotated() -> DetectionSet:
    boxes = np.array([[10, 10, 30, 30], [50, 20, 110, 90], [5, 60, 20, 75]], np.float32)
    first = ImageRecord(1, Path("a"), 120, 100, boxes, np.array([0, 1, 0]), np.array([False] * 3))
    second = ImageRecord(2, Path("b"), 120, 100, boxes[:1], np.array([1]), np.array([False]))
    return DetectionSet([first, second, ImageRecord(3, Path("c"), 120, 100)], ["x", "y"])


def perfect(index: int, record: ImageRecord) -> Prediction:
    return Prediction(index, record.boxes, np.linspace(0.9, 0.5, len(record.boxes)), record.labels)


def test_perfect_predictions_have_ap_1() -> None:
    data = annotated()
    values = average_precision(data, [perfect(i, r) for i, r in enumerate(data.images)])
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AR", "AP/x", "AP/y")
    assert values == dict.fromkeys(names, pytest.approx(1.0))


def test_no_predictions_have_ap_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert average_precision(annotated(), [])["AP"] == 0
    assert capsys.readouterr().out == ""


def test_ap_falls_with_misses_wrong_classes_and_loose_boxes() -> None:
    data = annotated()
    found = [perfect(i, r) for i, r in enumerate(data.images)]
    missed = average_precision(data, found[:1])
    assert missed["AR"] == pytest.approx((1 + 0.5) / 2)  # one of the two boxes of class y
    assert missed["AP/x"] == pytest.approx(1.0) and missed["AP/y"] < 0.6
    found[1].labels = np.array([0])
    assert average_precision(data, found)["AP"] < 1
    loose = [
        Prediction(i, r.boxes + np.float32([0, 0, 0, 6]), np.ones(len(r.boxes)), r.labels)
        for i, r in enumerate(data.images)
    ]
    values = average_precision(data, loose)
    assert values["AP50"] == pytest.approx(1.0) and values["AP"] < 0.9


def test_max_detections_limits_what_counts() -> None:
    data = annotated()
    found = [perfect(i, r) for i, r in enumerate(data.images)]
    assert average_precision(data, found, max_detections=1)["AR"] == pytest.approx((0.5 + 1) / 2)


def test_crowd_regions_count_neither_way() -> None:
    data = annotated()
    data.images[0].crowd[1] = True
    found = [perfect(i, r) for i, r in enumerate(data.images)]
    assert average_precision(data, found)["AP"] == pytest.approx(1.0)
    found[0] = Prediction(0, data.images[0].boxes[[0, 2]], np.ones(2), np.array([0, 0]))
    assert average_precision(data, found)["AP"] == pytest.approx(1.0)


def test_froc_by_hand() -> None:
    data = annotated()  # 4 lesions on 3 images
    first = data.images[0].boxes
    boxes = np.concatenate((first, first[:1] + 1, [[90, 2, 99, 9]])).astype(np.float32)
    #             hit, false: wrong class, hit, second hit: neither, false: nothing there
    labels, scores = np.array([0, 0, 0, 0, 1]), np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    found = [
        Prediction(0, boxes, scores, labels),
        Prediction(1, data.images[1].boxes, np.array([0.4]), np.array([1])),
    ]
    values = compute_froc(data, found)
    # false positives per image: 0 down to 0.9, 1/3 at 0.8, 2/3 at 0.5
    expected = {0.25: 1 / 4, 0.5: 2 / 4, 1: 3 / 4, 2: 3 / 4, 4: 3 / 4, 8: 3 / 4}
    assert {rate: values[f"sensitivity@{rate:g}"] for rate in expected} == pytest.approx(expected)
    assert values["FROC"] == pytest.approx(sum(expected.values()) / 6)
    data.images[0].crowd[2] = True  # what lies in it counts neither way, and 3 lesions are left
    assert compute_froc(data, found)["sensitivity@1"] == pytest.approx(2 / 3)


def test_froc_takes_equal_scores_together_and_stands_nothing_found() -> None:
    data = annotated()
    assert set(compute_froc(data, []).values()) == {0.0}
    one = data.images[1].boxes
    tied = Prediction(
        1,
        np.concatenate((one, one + 50)).astype(np.float32),
        np.array([0.5, 0.5]),
        np.array([1, 1]),
    )
    values = compute_froc(
        data, [tied]
    )  # the hit cannot be had without the false positive: 1/3 an image
    assert values["sensitivity@0.25"] == 0 and values["sensitivity@0.5"] == pytest.approx(1 / 4)


def test_froc_equals_a_loop_over_thresholds() -> None:
    rng = np.random.default_rng(0)
    records, found = [], []
    for index in range(6):
        corner, size = rng.uniform(0, 80, (8, 2)), rng.uniform(10, 20, (8, 2))
        truth = np.concatenate((corner, corner + size), 1).astype(np.float32)
        labels = rng.integers(0, 2, 8)
        records.append(
            ImageRecord(index, Path("x"), 100, 100, truth[:4], labels[:4], np.zeros(4, bool))
        )
        noisy = np.concatenate((truth, rng.permutation(truth))) + rng.normal(0, 2, (16, 4)).astype(
            np.float32
        )
        found.append(
            Prediction(
                index, noisy, rng.permutation(16) / 16 + index / 1000, rng.integers(0, 2, 16)
            )
        )
    data = DetectionSet(records, ["x", "y"])
    points = []
    for cut in np.concatenate([p.scores for p in found]):
        hits = wrong = 0
        for record, prediction in zip(records, found):
            claimed: set[int] = set()
            for i in sorted(range(16), key=lambda i: -prediction.scores[i]):
                if prediction.scores[i] < cut:
                    continue
                overlap = box_iou(
                    torch.tensor(prediction.boxes[i : i + 1]), torch.tensor(record.boxes)
                )[0].numpy()
                overlap[record.labels != prediction.labels[i]] = 0
                free = [k for k in np.argsort(-overlap) if overlap[k] >= 0.5 and k not in claimed]
                claimed |= set(free[:1])
                hits += bool(free)
                wrong += overlap.max() < 0.5
        points.append((wrong / 6, hits / 24))
    values = compute_froc(data, found)
    for rate in (0.25, 0.5, 1, 2, 4, 8):
        assert values[f"sensitivity@{rate:g}"] == pytest.approx(
            max([s for f, s in points if f <= rate], default=0.0)
        )
    assert 0.1 < values["FROC"] < 0.95
