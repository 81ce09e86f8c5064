"""Slides with scores for the tests of metrics: drawn from a seed, with ties."""

from __future__ import annotations

import numpy as np


def draw_positives(
    slides: int = 80, seed: int = 0, digits: int = 2, shift: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    """(bool (S,), every third is positive; scores (S,), higher by `shift` for the positives)."""
    generator = np.random.default_rng(seed)
    positive = np.arange(slides) % 3 == 0
    return positive, np.round(generator.random(slides) * 0.75 + shift * positive, digits)


def draw_classes(
    classes: int, slides: int = 60, seed: int = 0, digits: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(class indices (S,), probabilities (S, C)), one independent of the other."""
    generator = np.random.default_rng(seed)
    targets = np.arange(slides) % classes
    scores = np.round(generator.random((slides, classes)), digits) + 0.01
    return targets, scores / scores.sum(1, keepdims=True)


def two_classes(scores) -> np.ndarray:
    """(S, 2) probabilities from those of class 1."""
    scores = np.asarray(scores, dtype=float)
    return np.stack([1 - scores, scores], 1)


def draw_copies(slides: int, count: int = 40, seed: int = 1) -> np.ndarray:
    """How often each slide counts, 0 to 2, in each of `count` weightings: (count, S)."""
    return np.random.default_rng(seed).integers(0, 3, (count, slides))
