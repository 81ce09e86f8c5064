"""Metrics of classes against scikit-learn and hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.wsi_common.metrics.scored_slides import (
    draw_classes,
    two_classes,
)
from wsi_common.metrics.classification import (
    auc,
    auprc,
    confusion,
    predict_class,
    rates,
    youden_threshold,
)


def test_auc_by_hand_with_a_tie():
    # pairs (positive, negative): .9>.5, .9>.1, .5=.5 counts half, .5>.1 -> 3.5 of 4
    targets = np.array([1, 0, 1, 0])
    assert auc(targets, two_classes([0.9, 0.5, 0.5, 0.1]))[0] == pytest.approx(3.5 / 4)
    assert auc(targets, two_classes([0.9, 0.5, 0.6, 0.1]))[0] == 1.0
    assert auc(targets, two_classes([0.5] * 4))[0] == 0.5
    assert np.isnan(auc(np.array([1, 1]), two_classes([0.2, 0.3]))[0])


@pytest.mark.parametrize("seed", range(3))
def test_binary_metrics_are_scikit_learns(seed: int):
    targets, probabilities = draw_classes(2, seed=seed)
    probabilities = two_classes(np.round(probabilities[:, 1], 1))
    assert auc(targets, probabilities)[0] == pytest.approx(
        sk.roc_auc_score(targets, probabilities[:, 1])
    )
    predicted = predict_class(probabilities, 0.4)
    assert (predicted == (probabilities[:, 1] >= 0.4)).all()
    values = {name: value[0] for name, value in rates(confusion(targets, predicted, 2)).items()}
    assert values["f1"] == pytest.approx(sk.f1_score(targets, predicted))
    assert values["sensitivity"] == pytest.approx(sk.recall_score(targets, predicted))
    assert values["specificity"] == pytest.approx(sk.recall_score(targets, predicted, pos_label=0))
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(targets, predicted))
    assert values["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(targets, predicted)
    )


def test_multiclass_metrics_are_scikit_learns_macro():
    targets, probabilities = draw_classes(4)
    assert auc(targets, probabilities)[0] == pytest.approx(
        sk.roc_auc_score(targets, probabilities, multi_class="ovr")
    )
    predicted = predict_class(probabilities, None)
    values = rates(confusion(targets, predicted, 4))
    assert values["f1"][0] == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    assert values["sensitivity"][0] == pytest.approx(
        sk.recall_score(targets, predicted, average="macro")
    )
    by_hand = [((predicted != c) & (targets != c)).sum() / (targets != c).sum() for c in range(4)]
    assert values["specificity"][0] == pytest.approx(np.mean(by_hand))
    assert values["balanced_accuracy"][0] == pytest.approx(
        sk.balanced_accuracy_score(targets, predicted)
    )


def test_multiclass_auprc_is_the_macro_mean():
    generator = np.random.default_rng(0)
    probabilities, targets = generator.dirichlet(np.ones(4), 60), np.arange(60) % 4
    assert auprc(targets, probabilities)[0] == pytest.approx(
        sk.average_precision_score(np.eye(4)[targets], probabilities)
    )


def test_youden_threshold_by_hand():
    positive = np.array([False, False, True, False, True])
    # cuts: .25 -> J = 1 - 1/3, .55 -> J = 1/2 - 1/3... the best is between .2 and .3
    assert youden_threshold(positive, np.array([0.1, 0.2, 0.3, 0.5, 0.9])) == pytest.approx(0.25)
    # all cuts between .2 and .8 are equal by J only within one gap: its middle
    assert youden_threshold(np.array([False, True]), np.array([0.2, 0.8])) == pytest.approx(0.5)
    # scores upside down: nothing beats calling all one class (J = 0)
    cut = youden_threshold(np.array([True, False]), np.array([0.2, 0.8]))
    assert cut <= 0.2 or cut > 0.8


def test_youden_threshold_is_the_best_of_all_cuts():
    targets, probabilities = draw_classes(2, slides=40, seed=4)
    scores = probabilities[:, 1]
    fpr, tpr, _ = sk.roc_curve(targets, scores)
    called = scores >= youden_threshold(targets == 1, scores)
    assert called[targets == 1].mean() - called[targets == 0].mean() == pytest.approx(
        (tpr - fpr).max()
    )
