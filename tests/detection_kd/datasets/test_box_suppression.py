"""Suppression among the boxes that can collide equals torchvision's among all boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from detection_kd.datasets.box_suppression import suppress_boxes


def draw_boxes(
    seed: int, count: int, extent: float, sides: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of three classes with scores that repeat; a few are as large as the plane, a few have
    no area.
    """
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-extent / 2, extent / 2, (count, 2))
    lengths = rng.uniform(*sides, (count, 2))
    lengths[: count // 200] = extent
    lengths[-(count // 100) :, 0] = 0
    boxes = np.concatenate((corners, corners + lengths), 1).astype(np.float32)
    return boxes, rng.integers(1, 400, count).astype(np.float32) / 400, rng.integers(0, 3, count)


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    ("count", "extent", "sides"),
    [(6000, 3000, (5, 60)), (3000, 60, (10, 40)), (4000, 1000, (1, 400)), (1, 10, (1, 2))],
)
def test_it_keeps_what_torchvision_keeps(
    count: int, extent: float, sides: tuple[float, float], iou: float
) -> None:
    boxes, scores, labels = draw_boxes(int(10 * iou) + count, count, extent, sides)
    # above 4000 coordinates torchvision goes class by class; below it shifts boxes, which rounds
    wanted = [
        torch.from_numpy(np.flatnonzero(labels == label))[
            batched_nms(
                *(torch.from_numpy(values[labels == label]) for values in (boxes, scores, labels)),
                iou,
            )
        ]
        for label in np.unique(labels)
    ]
    kept = suppress_boxes(boxes, scores, labels, iou)
    assert sorted(kept.tolist()) == sorted(torch.cat(wanted).tolist())
    assert (np.diff(scores[kept]) <= 0).all()


def test_copies_of_a_few_boxes_leave_one_of_each() -> None:
    boxes = np.tile(np.array([[0, 0, 9, 9], [20, 0, 29, 9]], np.float32), (400, 1))
    scores = np.linspace(0.1, 1, 800).astype(np.float32)
    assert suppress_boxes(boxes, scores, np.zeros(800, np.int64), 0.5).tolist() == [799, 798]


def test_no_boxes_leave_none() -> None:
    empty = np.zeros(0)
    assert not len(suppress_boxes(np.zeros((0, 4), np.float32), empty, empty.astype(int), 0.5))
