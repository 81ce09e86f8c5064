"""Epochs in which every class is met equally often, and each process's share of them.

UTS draws its rare class with replacement and cuts the list off at the size of the set, so that
about a seventh of the positives may never be met. Here no sample is left out of any epoch.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

PURPOSE = 0x5A3B1E  # tells these draws from others of the same seed and epoch


def balance_epoch(
    labels: Int[np.ndarray, " n"],
    seed: int,
    epoch: int,
    multiple: int = 1,
    once: int | None = None,
) -> Int[np.ndarray, " m"]:
    """The samples of one epoch in their order, each class as often as the largest.

    With m samples in the largest class, every sample of a class of n is met floor(m / n) times;
    the rest of the m are drawn from that class without replacement, anew in every epoch.

    Args:
        labels: class of every sample.
        seed: of the run.
        epoch: how many came before.
        multiple: the epoch is filled up to a multiple of this (of samples per optimiser step),
            with samples from its start, so that no sample falls out of a last, smaller batch.
        once: label of samples that are of no class: each is met once.
    """
    rng = np.random.default_rng((seed % 2**64, epoch, PURPOSE))
    classes, counts = np.unique(labels, return_counts=True)
    most = max(counts[classes != once].tolist(), default=0)
    parts = [np.flatnonzero(labels == once)]
    for label, count in zip(classes[classes != once], counts[classes != once]):
        members = np.flatnonzero(labels == label)
        times, rest = divmod(most, int(count))
        parts += [np.tile(members, times), rng.permutation(members)[:rest]]
    order = rng.permutation(np.concatenate(parts))
    return np.resize(order, -(-len(order) // multiple) * multiple)


def share_of(indices: Int[np.ndarray, " m"], rank: int, world: int) -> Int[np.ndarray, " k"]:
    """What process `rank` of `world` takes of an epoch: the union over processes of each of their
    steps is a step of one process.
    """
    return indices[rank::world]


def count_repeats(indices: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """How often each entry's sample came before in the epoch: 0 where it is met first."""
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    places = np.arange(len(indices))
    first = np.r_[True, ordered[1:] != ordered[:-1]][: len(indices)]
    repeats = np.empty(len(indices), np.int64)
    repeats[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return repeats
