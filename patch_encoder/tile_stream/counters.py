"""Random numbers that are a pure function of a seed and of counters.

SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
figure 16): its finaliser is applied to the seed and to one counter after the other. There is no
state, so that any process computes the numbers of any draw.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def mix(value: int) -> int:
    """The finaliser of SplitMix64 on 64 bits: every bit of the input changes half of the output."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
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
