"""Plain records that tasks take and give, and the weighted sums that several of them compute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsi_common.metrics.ranking import ratio


@dataclass(frozen=True)
class TaskOptions:
    """What a user decides about the loss of a task; a task refuses the options of other tasks."""

    label_smoothing: float = 0.0
    focal: float = 0.0
    class_weights: bool = False
    intervals: int = 4
    censored_alpha: float = 0.0
    regression_loss: str = "mse"


@dataclass(frozen=True)
class RunPredictions:
    """What one trained model predicts for the slides of one set of its fold.

    Attributes:
        fold: number of the fold.
        cases: (S,) patient of each slide; resampling needs it.
    """

    fold: int
    cases: np.ndarray

    @property
    def strata(self) -> np.ndarray:
        """(S,) int: within these the slides' patients are resampled; one unless a class is rare."""
        return np.zeros(len(self.cases), np.int64)


@dataclass(frozen=True)
class FigureSpec:
    """A figure on the report page: its drawing (a key of mil.figures.by_task.FIGURES), what it is,
    and its caption, in which `{headline}` stands for the classifier.
    """

    drawing: str
    title: str
    caption: str


@dataclass(frozen=True)
class Verdict:
    """What a model makes of one slide, for people.

    Attributes:
        rank: by which example slides are chosen: how sure the call is; of tasks without calls the
            place of the risk or the error.
        label: what is known of the slide.
        called: what the model makes of it.
        detail: how sure that is.
        right: False where `called` contradicts `label`.
    """

    rank: float
    label: str
    called: str
    detail: str
    right: bool = True


def rank_places(values: np.ndarray) -> list[float | None]:
    """Share of the values that are lower, of each."""
    return [float((values < value).mean()) for value in values]


def weights_or_ones(weights: np.ndarray | None, slides: int) -> np.ndarray:
    """(B, S): the weightings, or one of ones."""
    return np.ones((1, slides)) if weights is None else weights


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over slides of (S,) values for every weighting, (B,)."""
    return ratio(weights @ values, weights.sum(1))
