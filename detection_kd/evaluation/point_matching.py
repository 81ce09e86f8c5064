"""Which detection has found which figure: one-to-one within a tolerance, and the published metric.

A figure can be found once, and a detection can find one figure. Distances are in um, so that one
tolerance holds for all scanners: 7.5 um is the rule of the TUPAC16 and MIDOG challenges (30 px at
0.25 um per px). A detection at exactly the tolerance counts as within it.

`count_many_to_many` is the metric that was published with the uninformed teacher-student: there two
detections of one figure are two hits, and one detection can find two figures. It is kept by name to
compare with published numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

RADIUS_UM = 7.5
EPSILON = 1e-3  # added to the denominators of the published metric

Points = Float[np.ndarray, "n 2"]
Truth = Float[np.ndarray, "m 2"]
Pairs = Int[np.ndarray, "k 2"]


class Counts(NamedTuple):
    """What became of the detections and figures of one or more fields."""

    hits: int
    false_positives: int
    misses: int


def match_points(found: Points, truth: Truth, radius: float = RADIUS_UM) -> Pairs:
    """Pair as many detections and figures as can be, and of all such pairings the nearest.

    Args:
        found, truth: (x, y) in um.
        radius: um that a detection may lie off.

    Returns:
        Index in `found` and index in `truth` of every pair, by rising index in `found`.
    """
    from scipy.optimize import linear_sum_assignment  # a while to load

    first, second = _find_near(found, truth, radius)
    pairs = [np.zeros((0, 2), np.int64)]
    for chosen in _split_groups(first, second, len(found), len(truth)):
        rows, row = np.unique(first[chosen], return_inverse=True)
        columns, column = np.unique(second[chosen], return_inverse=True)
        # farther pairs cost more than all near ones together, so that none displaces a near one
        cost = np.full((len(rows), len(columns)), radius * (len(rows) + 1))
        cost[row, column] = np.hypot(*(found[first[chosen]] - truth[second[chosen]]).T)
        left, right = linear_sum_assignment(cost)
        near = cost[left, right] <= radius
        pairs.append(np.stack([rows[left[near]], columns[right[near]]], 1))
    joined = np.concatenate(pairs)
    return joined[np.argsort(joined[:, 0], kind="stable")]


def _split_groups(
    first: Int[np.ndarray, " k"], second: Int[np.ndarray, " k"], found: int, truth: int
) -> list[Int[np.ndarray, " j"]]:
    """Numbers of the near pairs of every group of detections and figures that are connected by
    such pairs. Groups are matched apart, so that no matrix over a whole slide is made.
    """
    if not len(first):
        return []
    graph = coo_array((np.ones(len(first)), (first, found + second)), shape=(found + truth,) * 2)
    groups = connected_components(graph, directed=False)[1][first]
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def find_hits(
    found: Points, truth: Truth, scores: Float[np.ndarray, " n"], radius: float = RADIUS_UM
) -> Bool[np.ndarray, " n"]:
    """Which detections raise the number of figures found when they come in by falling score.

    The number of hits from any score on equals the number of pairs of `match_points` among the
    detections from that score on: detections join by augmenting paths (Kuhn 1955), and what can be
    matched is a matroid, in which the greedy order is the best at every cut.
    """
    first, second = _find_near(found, truth, radius)
    near: dict[int, list[int]] = {}
    for detection, figure in zip(first.tolist(), second.tolist(), strict=True):
        near.setdefault(detection, []).append(figure)
    owner, taken = dict[int, int](), dict[int, int]()  # detection of a figure, and the reverse

    def claim(detection: int) -> bool:
        reached, waiting = dict[int, int](), [detection]
        for current in waiting:  # grows: a loop, since chains of figures may be long
            for figure in near[current]:
                if figure in reached:
                    continue
                reached[figure] = current
                if figure in owner:
                    waiting.append(owner[figure])
                    continue
                given: int | None = figure
                while given is not None:  # everybody on the path moves on to the figure it reached
                    taker = reached[given]
                    owner[given], given, taken[taker] = taker, taken.get(taker), given
                return True
        return False

    hits = np.zeros(len(found), bool)
    for detection in np.argsort(-scores, kind="stable").tolist():
        hits[detection] = detection in near and claim(detection)
    return hits


def count_one_to_one(found: Points, truth: Truth, radius: float = RADIUS_UM) -> Counts:
    """Hits, false positives and misses of a field under `match_points`."""
    pairs = len(match_points(found, truth, radius))
    return Counts(pairs, len(found) - pairs, len(truth) - pairs)


def count_many_to_many(found: Points, truth: Truth, radius: float = RADIUS_UM) -> Counts:
    """Hits, false positives and misses of a field as the published method counts them.

    A detection is a hit if a figure lies nearer than `radius`. A figure is missed if no detection
    lies within `radius`: a detection at exactly that distance is a false positive whose figure is
    not missed.
    """
    to_truth, to_found = np.full(len(found), np.inf), np.full(len(truth), np.inf)
    if len(found) and len(truth):
        to_truth, to_found = cKDTree(truth).query(found)[0], cKDTree(found).query(truth)[0]
    hits = int((to_truth < radius).sum())
    return Counts(hits, len(found) - hits, int((to_found > radius).sum()))


def compute_published_rates(counts: Counts) -> dict[str, float]:
    """Precision, recall and F1 with the constants that the published method adds to denominators:
    a single figure that is found has an F1 of .9985.
    """
    precision = counts.hits / (counts.hits + counts.false_positives + EPSILON)
    recall = counts.hits / (counts.hits + counts.misses + EPSILON)
    f1 = 2 * precision * recall / (precision + recall + EPSILON)
    return {"f1": f1, "precision": precision, "recall": recall}


def _find_near(
    found: Points, truth: Truth, radius: float
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Every detection and figure within `radius` of each other, the nearest first per detection."""
    if not len(found) or not len(truth):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    near = cKDTree(found).sparse_distance_matrix(cKDTree(truth), radius, output_type="ndarray")
    near = near[np.lexsort((near["j"], near["v"], near["i"]))]
    return near["i"].astype(np.int64), near["j"].astype(np.int64)
