"""Curves and their areas against scikit-learn, loops over cuts and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.wsi_common.metrics.scored_slides import (
    draw_copies,
    draw_positives,
)
from wsi_common.metrics.ranking import (
    GRID,
    average_precision,
    binary_auc,
    precision_curves,
    roc_curves,
    sensitivity_on_curve,
    specificity_on_curve,
)


@pytest.mark.parametrize("digits", [1, 2, 8])
def test_areas_of_weighted_slides_are_scikit_learns(digits: int):
    positive, scores = draw_positives(digits=digits)
    weights = draw_copies(len(positive))
    areas, precisions = (
        binary_auc(positive, scores, weights),
        average_precision(positive, scores, weights),
    )
    for b, weight in enumerate(weights):
        assert areas[b] == pytest.approx(sk.roc_auc_score(positive, scores, sample_weight=weight))
        assert precisions[b] == pytest.approx(
            sk.average_precision_score(positive, scores, sample_weight=weight)
        )
    assert np.isnan(average_precision(np.zeros(3, bool), np.arange(3.0), np.ones((1, 3)))[0])


def test_rates_on_the_curve_are_the_best_of_all_cuts():
    positive, scores = draw_positives(digits=1)
    weights = draw_copies(80, 20)
    for target in (0.5, 0.9, 0.995):
        specificity = specificity_on_curve(positive, scores, weights, target)
        sensitivity = sensitivity_on_curve(positive, scores, weights, target)
        for b, w in enumerate(weights):
            found = []
            for cut in [*np.unique(scores), 2.0]:
                called = scores >= cut
                found.append(
                    (
                        (w * (called & positive)).sum() / w[positive].sum(),
                        (w * ~(called | positive)).sum() / w[~positive].sum(),
                    )
                )
            assert specificity[b] == pytest.approx(
                max(spec for sens, spec in found if sens >= target - 1e-12)
            )
            assert sensitivity[b] == pytest.approx(
                max(sens for sens, spec in found if spec >= target - 1e-12)
            )


def test_curves_go_through_scikit_learns_points():
    positive, scores = draw_positives(digits=2)
    weights = np.concatenate([np.ones((1, 80)), draw_copies(80, 3)])
    for curve, precisions, w in zip(
        roc_curves(positive, scores, weights),
        precision_curves(positive, scores, weights),
        weights,
        strict=True,
    ):
        fpr, tpr, _ = sk.roc_curve(positive, scores, sample_weight=w, drop_intermediate=False)
        for x, y in zip(GRID, curve, strict=True):
            assert (
                tpr[fpr <= x + 1e-12].max() - 1e-9 <= y <= tpr[fpr >= x - 1e-12].min() + 1e-9
                or x in fpr
            )
        assert np.trapezoid(curve, GRID) == pytest.approx(sk.auc(fpr, tpr), abs=0.02)
        precision, recall, _ = sk.precision_recall_curve(positive, scores, sample_weight=w)
        for x, y in zip(GRID[1:], precisions[1:], strict=True):
            assert y == pytest.approx(precision[:-1][recall[:-1] >= x - 1e-12][-1])


def test_roc_curve_follows_its_steps():
    generator = np.random.default_rng(0)
    positive, scores = np.arange(40) % 2 == 1, np.round(generator.random(40), 1)
    fpr, tpr, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    points = roc_curves(positive, scores)[0]
    for x, y in zip(GRID, points, strict=True):
        below, above = tpr[fpr <= x + 1e-12].max(), tpr[fpr >= x - 1e-12].min()
        assert below - 1e-9 <= y <= max(above, below) + 1e-9
    perfect = roc_curves(np.array([True, False]), np.array([0.9, 0.1]))[0]
    assert (perfect == 1).all()
    late = roc_curves(np.array([True, False, True, False]), np.array([0.9, 0.8, 0.7, 0.6]))[0]
    assert late[0] == 0.5 and late[49] == 0.5 and late[50] == 1.0
