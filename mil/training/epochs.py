"""Which bags an epoch takes, in which order, and which of their tiles; which epoch of a training
is the best one, and when the training ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mil.datasets.bags import Sample
from mil.training.recipes import Recipe
from wsi_common.errors import UserError


def draws(
    bags: Sequence[tuple[Sample, int]], tiles: int, seed: int
) -> Iterator[tuple[Sample, Tensor | None]]:
    """Each sample with its tiles of this pass: all (None), or `tiles` of them in the order of the
    bag.

    The draw depends on the seed and the bag's place in the epoch alone, not on who loads it.
    """
    for sample, place in bags:
        if not 0 < tiles < len(sample.bag):
            yield sample, None
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        drawn = torch.randperm(len(sample.bag), generator=generator)[:tiles]
        yield sample, drawn.sort().values


def class_weights(samples: Sequence[Sample]) -> dict[int, float]:
    """S / (C n_c) for every class c: mean 1 over the samples."""
    targets = [get_stratum(sample) for sample in samples]
    present = set(targets)
    return {c: len(targets) / (len(present) * targets.count(c)) for c in present}


def get_stratum(sample: Sample) -> int:
    """The class of a bag, or what stands for it."""
    return sample.target if isinstance(sample.target, int) else sample.stratum


def epoch_order(samples: Sequence[Sample], balanced: bool, generator: torch.Generator) -> list[int]:
    """Indices of an epoch's bags: all of them shuffled, or as many drawn with every class equally
    likely.
    """
    if not balanced:
        return torch.randperm(len(samples), generator=generator).tolist()
    weights = class_weights(samples)
    odds = torch.tensor([weights[get_stratum(sample)] for sample in samples], dtype=torch.float64)
    return torch.multinomial(odds, len(samples), replacement=True, generator=generator).tolist()


def is_better(value: Mapping[str, Any], best: Mapping[str, Any], score: str = "auc") -> bool:
    """Higher validation score, or the same with a lower loss; a score that is not a number is below
    all others.
    """
    return not best or _rank(value, score) > _rank(best, score)


def _rank(value: Mapping[str, Any], score: str) -> tuple[float, float]:
    known = not math.isnan(value[score])
    return (value[score] if known else -math.inf), -value["loss"]


class Smoother:
    """Moving average of the validation score and loss, by which epochs are compared: s * past + (1
    - s) * new.

    Starts at the first epoch's values; with s = 0 it is the values themselves.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share < 1:
            raise UserError(
                f"training.smoothing={share}: expected the share of the past, 0 <= smoothing < 1"
            )
        self.share, self.values = share, {}

    def __call__(self, values: Mapping[str, float], score: str) -> dict[str, float]:
        """The averages after one more epoch."""
        new = {name: values[name] for name in (score, "loss")}
        self.values = {name: self._mean(self.values.get(name, math.nan), new[name]) for name in new}
        return dict(self.values)

    def _mean(self, past: float, new: float) -> float:
        """What is no number (a score of slides that cannot be ranked) leaves the average alone."""
        if not self.share or math.isnan(past):
            return new
        return past if math.isnan(new) else self.share * past + (1 - self.share) * new

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return dict(self.values)

    def load_state_dict(self, values: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self.values = dict(values)


def is_over(epoch: int, best: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether training ends after `epoch` completed epochs."""
    if epoch >= recipe.epochs:
        return True
    return bool(best) and epoch >= recipe.min_epochs and epoch - best["epoch"] >= recipe.patience
