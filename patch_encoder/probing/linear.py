"""The linear probe: logistic regression on frozen features.

Features are standardised with the training tiles, classes weigh the same, and C, the inverse
strength of the L2 penalty, is chosen by the mean AUC of inner folds of the training tiles.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from patch_encoder.probing.folds import draw_inner_folds
from wsi_common.metrics.classification import auc

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
ITERATIONS = 1000  # of L-BFGS; classes that can be separated hardly converge, and need not


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
) -> tuple[np.ndarray, float]:
    """Probabilities of each class, (T, C), and the C that was chosen.

    Args:
        train_x: features (N, D).
        train_y: class indices (N,), each of the C classes there at least once.
        test_x: features (T, D).
        groups: of the training tiles, (N,); inner folds keep them whole.
        seed: of the inner folds.
    """
    chosen = choose_strength(train_x, train_y, groups, seed)
    return next(_fit(train_x, train_y, test_x, (chosen,))), chosen


def choose_strength(
    features: np.ndarray, targets: np.ndarray, groups: np.ndarray, seed: int
) -> float:
    """The C of STRENGTHS with the best mean AUC over inner folds, among equals the smallest; 1
    where a class has one group only.
    """
    folds = draw_inner_folds(targets, groups, seed)
    if not folds:
        return 1.0
    scores = np.array(
        [
            [
                auc(targets[held], probabilities)[0]
                for probabilities in _fit(features[rest], targets[rest], features[held], STRENGTHS)
            ]
            for rest, held in folds
        ]
    )  # (folds, STRENGTHS)
    mean = np.nanmean(scores, axis=0)
    return STRENGTHS[int(np.flatnonzero(mean >= mean.max() - 1e-9)[0])]


def _fit(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, strengths: Sequence[float]
) -> Iterator[np.ndarray]:
    """Yield probabilities (T, C) for each C, from the strongest penalty on; each fit starts where
    the one before ended.
    """
    from sklearn.exceptions import ConvergenceWarning  # seconds to load
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_x.astype(np.float64))
    train, test = (scaler.transform(part.astype(np.float64)) for part in (train_x, test_x))
    if train.shape[1] > len(train):
        # the weights lie in the space of the training tiles, whose axes may be turned as one likes
        axes = np.linalg.qr(train.T)[0]  # (D, N)
        train, test = train @ axes, test @ axes
    model = LogisticRegression(class_weight="balanced", max_iter=ITERATIONS, warm_start=True)
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=strength).fit(train, train_y)
        yield model.predict_proba(test)
