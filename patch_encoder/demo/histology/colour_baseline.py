"""What colour alone tells about pictures: the baseline that a set for finding shapes must not give
the answer to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from patch_encoder.descriptors.colour_statistics import colour_statistics
from wsi_common.metrics.ranking import binary_auc


def measure_colour(
    train: Sequence[UInt8[np.ndarray, "h w 3"]],
    test: Sequence[UInt8[np.ndarray, "h w 3"]],
    train_labels: np.ndarray,
    test_labels: np.ndarray,
) -> float:
    """AUC, on test pictures, of a logistic regression on 33 colour numbers per picture.

    Args:
        train_labels: (N,), 1 or 0, of the training pictures; both are there.
        test_labels: (T,), of the test pictures; both are there.
    """
    from sklearn.linear_model import LogisticRegression  # a while to load

    rows = [np.stack([colour_statistics(picture) for picture in part]) for part in (train, test)]
    mean, spread = rows[0].mean(axis=0), rows[0].std(axis=0) + 1e-6
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit((rows[0] - mean) / spread, train_labels)
    scores = model.decision_function((rows[1] - mean) / spread)
    return float(binary_auc(test_labels == 1, scores)[0])


def measure_darkness(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], labels: np.ndarray) -> float:
    """AUC of the rule that pictures with the darker darkest 3 x 3 px are positive."""
    from scipy.ndimage import uniform_filter  # a while to load

    darkest = [-float(uniform_filter(picture.mean(axis=-1), 3).min()) for picture in pictures]
    return float(binary_auc(labels == 1, np.array(darkest))[0])
