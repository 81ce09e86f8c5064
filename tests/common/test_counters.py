"""Counter-based random numbers: SplitMix64's own, uniform, independent, the same alone as in a
batch.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from common.counters import draw_uniforms, hash_counters


def test_one_counter_is_splitmix64() -> None:
    """The first numbers that the published generator gives for seed 0."""
    assert [hex(value) for value in hash_counters(np.arange(3))] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_an_address_has_one_number_however_it_is_asked_for() -> None:
    tiles, draws = np.array([7, 0, 2**62])[:, None], np.arange(5)
    together = draw_uniforms(-3, tiles, 2, draws)
    assert together.shape == (3, 5)
    for row, tile in enumerate(tiles[:, 0].tolist()):
        assert [draw_uniforms(-3, tile, 2, draw)[0] for draw in range(5)] == together[row].tolist()


def test_every_counter_and_its_place_matter() -> None:
    grid = hash_counters(*np.meshgrid(*[np.arange(12)] * 4, indexing="ij"))
    assert len(np.unique(grid)) == 12**4


def test_numbers_are_uniform_and_neighbours_independent() -> None:
    numbers = draw_uniforms(0, np.arange(300)[:, None], np.arange(100))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    for first, second in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.015
