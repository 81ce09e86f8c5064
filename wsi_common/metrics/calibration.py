"""Whether probabilities mean what they say: expected calibration error (ECE), Brier score,
reliability, and the temperature that mends them.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Two classes: the probability of
class 1 against how often class 1 is true, which is what a reader of a risk asks. More: the
probability of the called class against how often it is right (top-label, as published). Difference:
10 bins of equal width, not 15; cohorts of slides are small.
"""

from __future__ import annotations

import numpy as np

BINS = 10
# where the search ends when the validation slides are separated without an error
TEMPERATURES = (0.05, 20.0)
TINY = 1e-12


def stated_and_true(
    targets: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(probability stated, 1.0 where it came true) of every slide, each (S,)."""
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], (targets == 1).astype(np.float64)
    return probabilities.max(1), (probabilities.argmax(1) == targets).astype(np.float64)


def bin_of(stated: np.ndarray) -> np.ndarray:
    """Index of each probability's bin, (S,): [0, 0.1), [0.1, 0.2), ..., [0.9, 1]."""
    return np.minimum((stated * BINS).astype(np.int64), BINS - 1)


def expected_calibration_error(
    stated: np.ndarray, true: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """ECE = sum over bins of (bin's share of the slides) x |mean probability - share that came
    true|, (B,).

    Args:
        stated, true: (S,), as `stated_and_true` gives them.
        weights: (B, S).
    """
    # share x |mean p - mean y| of a bin is |sum of w (p - y)| / sum of all w
    gaps = weights @ (np.eye(BINS)[bin_of(stated)] * (stated - true)[:, None])  # (B, bins)
    return np.abs(gaps).sum(1) / np.maximum(weights.sum(1), TINY)


def brier(targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean squared error of the probabilities, (B,): of class 1 with two classes, summed over
    classes with more.
    """
    errors = (probabilities - np.eye(probabilities.shape[1])[targets]) ** 2
    each = errors[:, 1] if probabilities.shape[1] == 2 else errors.sum(1)
    return weights @ each / np.maximum(weights.sum(1), TINY)


def calibration(
    targets: np.ndarray,
    probabilities: np.ndarray,
    temperature: float,
    weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """`brier`, `ece`, and `ece_scaled` after temperature scaling, each (B,).

    Args:
        targets: int (S,).
        probabilities: (S, C).
        temperature: fitted on other slides, see `fit_temperature`.
        weights: (B, S); None: ones, B = 1.
    """
    weights = np.ones((1, len(targets))) if weights is None else weights
    scaled = apply_temperature(probabilities, temperature)
    return {
        "brier": brier(targets, probabilities, weights),
        "ece": expected_calibration_error(*stated_and_true(targets, probabilities), weights),
        "ece_scaled": expected_calibration_error(*stated_and_true(targets, scaled), weights),
    }


def reliability(
    stated: np.ndarray, true: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean probability, share that came true, weight) of every bin, each (B, BINS); NaN in empty
    bins.
    """
    cells = np.eye(BINS)[bin_of(stated)]
    count = weights @ cells
    with np.errstate(invalid="ignore", divide="ignore"):
        return (
            weights @ (cells * stated[:, None]) / count,
            weights @ (cells * true[:, None]) / count,
            count,
        )


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature), (S, C), from softmax(logits): logits are log-probabilities up
    to a constant.
    """
    logs = np.log(np.maximum(probabilities, TINY)) / temperature
    raised = np.exp(logs - logs.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def fit_temperature(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood on these (validation) slides, within
    TEMPERATURES.

    The likelihood is concave in 1 / temperature, so that a search along one line finds the best.
    """
    from scipy.optimize import minimize_scalar  # a second to load

    logs = np.log(np.maximum(probabilities, TINY))
    rows = np.arange(len(targets))

    def loss(inverse: float) -> float:
        scaled = logs * inverse
        top = scaled.max(1)
        return float(
            (top + np.log(np.exp(scaled - top[:, None]).sum(1)) - scaled[rows, targets]).mean()
        )

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    return float(1 / best.x)
