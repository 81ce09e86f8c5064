"""Which bags an epoch takes, in which order, and which of their tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mil.datasets.bags import Sample


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
