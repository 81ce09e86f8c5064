"""Random numbers that are a pure function of counters, so that draws are the same for any number of
processes and workers.

A generator hands out its numbers in the order in which it is asked. Here every number has an
address instead, such as (seed, sample, view, which draw), and is computed from it alone. The hash
is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied once per counter of the address.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: SplitMix64's increment
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hash_counters(*counters: int | np.ndarray) -> np.ndarray:
    """64 random bits per address.

    Args:
        counters: whole numbers below 2^63, or arrays of them, that broadcast with each other; the
            first one is usually the seed of the run.

    Returns:
        uint64, of the shape that the counters broadcast to, at least one-dimensional.
    """
    state = np.zeros(1, np.uint64)
    for counter in counters:
        step = np.atleast_1d(np.asarray(counter, np.int64)).view(np.uint64) + np.uint64(1)
        state = _mix(state + step * GOLDEN)
    return state


def draw_uniforms(*counters: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), one per address as in `hash_counters`; float64 with 53 random bits."""
    return (hash_counters(*counters) >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection in which every bit depends on every other."""
    state = (state ^ (state >> np.uint64(30))) * FIRST
    state = (state ^ (state >> np.uint64(27))) * SECOND
    return state ^ (state >> np.uint64(31))
