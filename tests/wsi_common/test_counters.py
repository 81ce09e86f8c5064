"""Numbers by address: SplitMix64's own, the same for one address and for arrays, uniform,
independent.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from wsi_common.counters import draw_uniforms, hash_counters, permutation, uniform


def test_it_is_splitmix64() -> None:
    """The first numbers that the published generator gives for seed 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash_counters(0) == published[0]
    assert [uniform(0, number) * 2**53 for number in range(3)] == [bits >> 11 for bits in published]


def test_arrays_of_addresses_give_the_numbers_of_each() -> None:
    tiles, draws = np.array([7, 0, 2**62])[:, None], np.arange(5)
    for seed in (0, -3, 2**40):
        together = draw_uniforms(seed, tiles, 2, draws)
        assert together.shape == (3, 5)
        for row, tile in enumerate(tiles[:, 0].tolist()):
            state = hash_counters(seed, tile, 2)
            assert [uniform(state, draw) for draw in range(5)] == together[row].tolist()


def test_every_counter_and_its_place_matter() -> None:
    grid = draw_uniforms(0, *np.meshgrid(*[np.arange(12)] * 4, indexing="ij"))
    assert len(np.unique(grid)) == 12**4
    assert hash_counters(0, 1) != hash_counters(1, 0) != hash_counters(1, 0, 0)


def test_numbers_are_uniform_and_neighbours_independent() -> None:
    numbers = draw_uniforms(0, np.arange(300)[:, None], np.arange(100))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    for first, second in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.015


def test_permutations_are_uniform() -> None:
    orders = np.array([permutation(hash_counters(0, block), 4) for block in range(12_000)])
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (12_000, 1)))
    names, counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)
    assert len(names) == 24 and counts.min() > 400 and counts.max() < 600  # 500 each
