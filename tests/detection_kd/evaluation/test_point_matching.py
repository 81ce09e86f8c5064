"""Matching of detections with figures: one-to-one against all pairings, and the published metric."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from detection_kd.evaluation.point_matching import (
    Counts,
    compute_published_rates,
    count_many_to_many,
    count_one_to_one,
    find_hits,
    match_points,
)


def points(*values: tuple[float, float]) -> np.ndarray:
    return np.array(values, float).reshape(-1, 2)


def try_all_pairings(found: np.ndarray, truth: np.ndarray, radius: float) -> tuple[int, float]:
    """Most pairs, and the least sum of distances of that many."""
    distances = np.hypot(*(found[:, None] - truth[None]).transpose(2, 0, 1))
    if len(found) > len(truth):
        distances = distances.T
    best = (0, 0.0)
    for order in permutations(range(distances.shape[1]), distances.shape[0]):
        chosen = distances[np.arange(len(order)), list(order)]
        near = chosen[chosen <= radius]
        best = min(best, (-len(near), float(near.sum())))
    return -best[0], best[1]


@pytest.mark.parametrize("seed", range(20))
def test_matching_is_the_best_of_all_pairings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, truth = rng.uniform(0, 20, (rng.integers(1, 6), 2)), rng.uniform(0, 20, (5, 2))
    pairs = match_points(found, truth, 7.5)
    distances = np.hypot(*(found[pairs[:, 0]] - truth[pairs[:, 1]]).T)
    assert (distances <= 7.5).all()
    assert all(len(set(side)) == len(pairs) for side in pairs.T.tolist()), "one-to-one"
    assert (len(pairs), distances.sum()) == pytest.approx(try_all_pairings(found, truth, 7.5))


@pytest.mark.parametrize("seed", range(20))
def test_hits_by_score_are_those_of_matching_at_every_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, truth = rng.uniform(0, 60, (40, 2)), rng.uniform(0, 60, (25, 2))
    scores = rng.integers(0, 9, 40) / 9  # equal ones, too
    hits = find_hits(found, truth, scores, 7.5)
    for cut in np.unique(scores):
        kept = scores >= cut
        pairs = len(match_points(found[kept], truth, 7.5))
        assert hits[kept].sum() == pairs


def test_a_sure_detection_gives_way_to_one_that_has_no_other_figure() -> None:
    """Greedily the surer one takes the middle figure and the other finds nothing."""
    found, truth = points((5, 0), (0, 0)), points((4, 0), (10, 0))
    scores = np.array([0.9, 0.8])
    assert match_points(found, truth).tolist() == [[0, 1], [1, 0]]
    assert find_hits(found, truth, scores).tolist() == [True, True]


@pytest.mark.parametrize(
    ("found", "truth", "counts"),
    [
        (points((0, 0), (0, 5)), points((0, 2)), Counts(1, 1, 0)),  # two on one figure
        (points((0, 0)), points((-5, 0), (5, 0)), Counts(1, 0, 1)),  # one between two
        (points((0, 7.5)), points((0, 0)), Counts(1, 0, 0)),  # 7.5 um are within
        (points((0, 7.6)), points((0, 0)), Counts(0, 1, 1)),
        (points(), points((0, 0)), Counts(0, 0, 1)),
        (points((0, 0)), points(), Counts(0, 1, 0)),
        (points(), points(), Counts(0, 0, 0)),
    ],
)
def test_a_figure_is_found_once_and_a_detection_finds_one(
    found: np.ndarray, truth: np.ndarray, counts: Counts
) -> None:
    assert count_one_to_one(found, truth) == counts
    assert find_hits(found, truth, np.ones(len(found))).sum() == counts.hits


@pytest.mark.parametrize(
    ("found", "truth", "counts"),
    [
        (points((0, 10), (10, 0)), points((0, 0)), Counts(2, 0, 0)),  # two on one figure
        (points((10, 0)), points((0, 0), (20, 0)), Counts(1, 0, 0)),  # one between two
        (points((29, 0)), points((0, 0)), Counts(1, 0, 0)),
        (points((30, 0)), points((0, 0)), Counts(0, 1, 0)),  # neither found nor missed
        (points((31, 0)), points((0, 0)), Counts(0, 1, 1)),
        (points(), points((0, 0)), Counts(0, 0, 1)),
        (points((0, 0)), points(), Counts(0, 1, 0)),
    ],
)
def test_the_published_metric_counts_many_to_many(
    found: np.ndarray, truth: np.ndarray, counts: Counts
) -> None:
    assert count_many_to_many(found, truth, 30) == counts


def test_a_single_figure_that_is_found_has_the_published_f1() -> None:
    rates = compute_published_rates(Counts(1, 0, 0))
    assert rates["f1"] == pytest.approx(0.9985, abs=5e-5)
    assert rates["precision"] == rates["recall"] == pytest.approx(1 / 1.001)
    assert compute_published_rates(Counts(0, 0, 0))["f1"] == 0


def test_many_detections_and_few_figures_take_no_dense_matrix() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 5e4, (2000, 2))
    found = np.concatenate([truth + 1, rng.uniform(0, 5e4, (200_000, 2))])
    hits = find_hits(found, truth, np.linspace(1, 0, len(found)))
    assert hits[:2000].sum() >= 1990 and hits.sum() == 2000


def test_a_slide_full_of_figures_is_matched_group_by_group() -> None:
    """8,000 figures: a matrix of all of them would take half a GB, and much longer."""
    rng = np.random.default_rng(0)
    truth = np.stack(np.meshgrid(np.arange(100), np.arange(80)), -1).reshape(-1, 2) * 30.0
    order = rng.permutation(len(truth))
    pairs = match_points(truth[order] + rng.uniform(-3, 3, truth.shape), truth)
    np.testing.assert_array_equal(pairs, np.stack([np.arange(len(truth)), order], 1))


def test_a_long_chain_of_figures_moves_on_by_one() -> None:
    """Each detection lies between two figures and has the nearer one, until the weakest comes."""
    count = 3000
    truth = np.stack([np.arange(count) * 10.0, np.zeros(count)], 1)
    found = np.concatenate([truth[:-1] + np.array([4.9, 0]), [[-3.0, 0.0]]])
    hits = find_hits(found, truth, np.linspace(1, 0, count))
    assert hits.all() and len(match_points(found, truth)) == count
