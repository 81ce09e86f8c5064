"""Non-maximum suppression of all boxes of a slide, which compares only boxes that can collide.

Source: torchvision's `batched_nms`, whose result it gives, ties included: the same overlap in
float32, the same order. Differences: a box is compared with those that share a cell of a grid with
it, not with all others, and what collides is settled for all boxes at once. A slide's 10^6 boxes
thus take seconds; time and memory grow with the number of pairs that touch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Touching(NamedTuple):
    """Pairs of boxes that share area, each once: numbers of both, and the shared px."""

    first: Int[np.ndarray, " pairs"]
    second: Int[np.ndarray, " pairs"]
    shared: Float[np.ndarray, " pairs"]


def find_areas(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Areas in float32, as torchvision computes them."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def find_touching(boxes: Float[np.ndarray, "n 4"], labels: Int[np.ndarray, " n"]) -> Touching:
    """All pairs of xyxy boxes of the same class that share area."""
    empty = np.zeros(0, np.int64)
    pairs = [Touching(empty, empty, np.zeros(0, np.float32))]
    for label in np.unique(labels):
        numbers = np.flatnonzero(labels == label)
        numbers = numbers[find_areas(boxes[numbers]) > 0]
        if len(numbers) > 1:
            found = _find_touching_in_class(boxes[numbers])
            pairs += [Touching(numbers[a], numbers[b], shared) for a, b, shared in found]
    return Touching(*(np.concatenate(values) for values in zip(*pairs, strict=True)))


def _find_touching_in_class(boxes: Float[np.ndarray, "n 4"]) -> list[Touching]:
    """The pairs by steps of their distance in the list of a cell's boxes."""
    side = 2 * float((boxes[:, 2:] - boxes[:, :2]).mean())
    corner = boxes[:, :2].min(0)
    cells = ((boxes - np.tile(corner, 2)) // side).astype(np.int64)  # that the two corners lie in
    owners, keys = _list_cells(cells)
    ends = np.searchsorted(keys, keys, side="right")
    pairs, start, step = [], np.arange(len(keys)), 0
    while len(start):
        step += 1
        start = start[start + step < ends[start]]
        pair = Touching(owners[start], owners[start + step], np.zeros(0, np.float32))
        pairs.append(_keep_touching(boxes, cells, keys[start], pair))
    return pairs


def _list_cells(
    cells: Int[np.ndarray, "n 4"],
) -> tuple[Int[np.ndarray, " entries"], Int[np.ndarray, " entries"]]:
    """Every box in every cell that it reaches into: numbers of boxes and keys of cells, by key."""
    spans = cells[:, 2:] - cells[:, :2] + 1
    counts = spans.prod(1)
    owners = np.repeat(np.arange(len(cells)), counts)
    place = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows, columns = np.divmod(place, spans[owners, 0])
    keys = _make_keys(cells, cells[owners, 0] + columns, cells[owners, 1] + rows)
    order = np.argsort(keys, kind="stable")
    return owners[order], keys[order]


def _make_keys(
    cells: Int[np.ndarray, "n 4"], x: Int[np.ndarray, " m"], y: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " m"]:
    return y * (int(cells[:, 2].max()) + 1) + x


def _keep_touching(
    boxes: Float[np.ndarray, "n 4"],
    cells: Int[np.ndarray, "n 4"],
    keys: Int[np.ndarray, " m"],
    pair: Touching,
) -> Touching:
    """Those of the pairs of cells `keys` that share area, in one cell of all that they share: the
    one where the shared area starts.
    """
    a, b, _ = pair
    starts = np.maximum(cells[a, :2], cells[b, :2])
    here = _make_keys(cells, starts[:, 0], starts[:, 1]) == keys
    a, b = a[here], b[here]
    low, high = np.maximum(boxes[a, :2], boxes[b, :2]), np.minimum(boxes[a, 2:], boxes[b, 2:])
    shared = np.maximum(high - low, 0).prod(1)
    kept = shared > 0
    return Touching(a[kept], b[kept], shared[kept])


def keep_highest(
    order: Int[np.ndarray, " n"],
    first: Int[np.ndarray, " pairs"],
    second: Int[np.ndarray, " pairs"],
) -> Bool[np.ndarray, " n"]:
    """Which of the boxes stay when, taken in `order`, each one that stays suppresses those that it
    collides with.

    Args:
        order: numbers of the boxes, the first one to stay first.
        first, second: the pairs that collide.
    """
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    swap = rank[first] > rank[second]
    above, below = np.where(swap, second, first), np.where(swap, first, second)
    kept, gone = np.zeros(len(order), bool), np.zeros(len(order), bool)
    while not (kept | gone).all():
        # nothing that may still stay is above these
        blocked = np.zeros(len(order), bool)
        blocked[below] = True
        kept |= ~gone & ~blocked
        gone[below[kept[above]]] = True
        open_pairs = ~(kept[above] | gone[above] | gone[below])
        above, below = above[open_pairs], below[open_pairs]
    return kept


def suppress_boxes(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    iou: float,
) -> Int[np.ndarray, " kept"]:
    """Numbers of the boxes that no stronger box of their class overlaps by more than `iou`, by
    falling score.
    """
    pairs, areas = find_touching(boxes, labels), find_areas(boxes)
    union = areas[pairs.first] + areas[pairs.second] - pairs.shared
    collide = pairs.shared / union > iou
    order = np.argsort(-scores, kind="stable")
    kept = keep_highest(order, pairs.first[collide], pairs.second[collide])
    return order[kept[order]]
