"""Balanced epochs: no sample is lost, classes are met equally often, epochs follow from their
numbers.
"""

from __future__ import annotations

import numpy as np
import pytest

from wsi_common.sampling import balance_epoch, count_repeats, share_of


@pytest.mark.parametrize("counts", [(9000, 1000), (1600, 1000), (1400, 1000), (7, 7), (5, 3, 1)])
def test_every_sample_is_met_and_every_class_as_often(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    order = balance_epoch(labels, seed=0, epoch=0)
    met = np.bincount(order, minlength=len(labels))
    for label, count in enumerate(counts):
        own = met[labels == label]
        times, rest = divmod(max(counts), count)
        assert own.sum() == max(counts)
        assert np.bincount(own, minlength=times + 2)[times:].tolist() == [count - rest, rest]


def test_epochs_differ_and_follow_from_seed_and_number() -> None:
    labels = np.repeat([0, 1], [50, 8])
    epochs = {
        (seed, epoch): tuple(balance_epoch(labels, seed, epoch))
        for seed in (0, 1)
        for epoch in range(3)
    }
    assert len(set(epochs.values())) == 6
    assert epochs[1, 2] == tuple(balance_epoch(labels, 1, 2))
    extra = [np.flatnonzero(np.bincount(order)[50:] == 7) for order in epochs.values()]
    assert len(np.unique(np.concatenate(extra))) > 2  # the two drawn once more are other ones


def test_an_epoch_is_filled_up_to_whole_batches_and_loses_nothing() -> None:
    labels = np.repeat([0, 1], [50, 8])
    plain, filled = balance_epoch(labels, 0, 0), balance_epoch(labels, 0, 0, multiple=32)
    assert len(plain) == 100 and len(filled) == 128
    assert np.array_equal(filled[:100], plain) and np.array_equal(filled[100:], plain[:28])


def test_samples_of_no_class_are_met_once() -> None:
    """However many they are, they do not repeat the others."""
    labels = np.repeat([0, 1, -100], [5, 3, 40])
    met = np.bincount(balance_epoch(labels, 0, 0, once=-100), minlength=len(labels))
    assert (met[labels == -100] == 1).all()
    assert [met[labels == label].sum() for label in (0, 1)] == [5, 5]


def test_one_class_and_no_sample() -> None:
    assert sorted(balance_epoch(np.ones(5, int), 0, 0)) == list(range(5))
    assert len(balance_epoch(np.empty(0, int), 0, 0, multiple=4)) == 0


def test_processes_share_every_step() -> None:
    order = balance_epoch(np.repeat([0, 1], [50, 8]), 0, 0, multiple=8)
    shares = [share_of(order, rank, 4) for rank in range(4)]
    for step in range(len(order) // 8):
        own = [share[2 * step : 2 * step + 2] for share in shares]
        assert sorted(np.concatenate(own)) == sorted(order[8 * step : 8 * step + 8])


def test_repeats_count_within_the_order() -> None:
    order = np.array([4, 1, 4, 4, 0, 1])
    assert count_repeats(order).tolist() == [0, 0, 1, 2, 0, 1]
    assert count_repeats(order[:0]).tolist() == []
