"""Random numbers that are a pure function of a seed and of counters.

A generator hands out its numbers in the order in which it is asked. Here every number has an
address instead, such as (seed, tile, view, which draw), so that any process computes the numbers of
any draw. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014, figure 16), applied to the seed and to one counter after the other.
It comes in two forms, for single addresses and for arrays of them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(value: int) -> int:
    """The finaliser of SplitMix64 on 64 bits: every bit of the input changes half of the output."""
    value = (value ^ (value >> 30)) * FIRST & MASK
    value = (value ^ (value >> 27)) * SECOND & MASK
    return value ^ (value >> 31)


def hash_counters(seed: int, *counters: int) -> int:
    """64 bits for a seed and counters; their order and their number matter."""
    state = mix((seed + GAMMA) & MASK)
    for counter in counters:
        state = mix((state + GAMMA * (counter + 1)) & MASK)
    return state


def uniform(state: int, number: int) -> float:
    """The `number`-th number of [0, 1) of a hash: 53 bits of SplitMix64's sequence from there."""
    return (mix((state + GAMMA * (number + 1)) & MASK) >> 11) * 2.0**-53


def permutation(state: int, size: int) -> Int[np.ndarray, " size"]:
    """A permutation of 0 .. size - 1: the order of `size` numbers of the sequence."""
    numbers = [mix((state + GAMMA * (number + 1)) & MASK) for number in range(size)]
    return np.argsort(np.array(numbers, dtype=np.uint64), kind="stable")


def draw_uniforms(seed: int, *counters: int | np.ndarray) -> Float[np.ndarray, "*shape"]:
    """`uniform(hash_counters(seed, a, ...), z)` for arrays of counters a, ..., z at once.

    Args:
        seed: of the run.
        counters: at least one; whole numbers from 0 on, or int64 arrays, that broadcast.
    """
    state = np.array([hash_counters(seed)], np.uint64)
    for counter in counters:
        steps = np.atleast_1d(np.asarray(counter, np.int64)).view(np.uint64)
        state = _mix_array(state + (steps + np.uint64(1)) * np.uint64(GAMMA))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix_array(value: np.ndarray) -> np.ndarray:
    """`mix` for arrays, whose products keep 64 bits by themselves."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(SECOND)
    return value ^ (value >> np.uint64(31))
