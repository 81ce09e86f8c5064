"""Simple rows that a deep MIL method has to beat: mean, max and min of a bag's instances into an
SVM or a logistic model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

SIMPLE = ("rbf_svm", "logistic")


def pool_bags(bags: Sequence[Float[np.ndarray, "_ d"]]) -> Float[np.ndarray, "b three_d"]:
    """Mean, max and min over the instances, side by side."""
    return np.stack([np.concatenate([bag.mean(0), bag.max(0), bag.min(0)]) for bag in bags])


def build_baseline(name: str) -> Pipeline:
    """Standardisation and `rbf_svm` (C = 3) or `logistic` (C = 0.05)."""
    from sklearn.linear_model import LogisticRegression  # a while to load
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = SVC(C=3.0) if name == "rbf_svm" else LogisticRegression(C=0.05, max_iter=2000)
    return make_pipeline(StandardScaler(), model)


def predict_simple(
    name: str, vectors: Float[np.ndarray, "b f"], targets: Int[np.ndarray, " b"], test: np.ndarray
) -> Int[np.ndarray, " t"]:
    """Classes of the test bags by a model of the others, standardised by the others."""
    return build_baseline(name).fit(vectors[~test], targets[~test]).predict(vectors[test])
