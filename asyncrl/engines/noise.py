"""The random numbers of generation: a counter-based hash, so that they need no state and no order.

Owns the function (seed, position) -> uniform. Never draws from a generator object: whatever else runs in
the batch, and however often a response was stopped and resumed, its t-th token sees the same number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Seeds = NDArray[np.uint64]
Positions = NDArray[np.int64]

# splitmix64 (Steele, Lea, Flood 2014): the golden-ratio increment and the two multipliers of its finaliser.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
SHIFT_1, SHIFT_2, SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
# A double holds 53 bits of mantissa, so 11 of 64 are dropped.
DROPPED_BITS = np.uint64(11)
UNIT = 2.0**-53
SEED_MASK = 2**64 - 1


def seed_word(seed: int) -> np.uint64:
    """A seed of any size or sign as the 64-bit word that is hashed."""
    return np.uint64(seed & SEED_MASK)


def mix(words: Seeds) -> Seeds:
    """splitmix64's finaliser: a bijection of 64-bit words that looks random. Shape is kept."""
    words = (words ^ (words >> SHIFT_1)) * MIX_1
    words = (words ^ (words >> SHIFT_2)) * MIX_2
    return words ^ (words >> SHIFT_3)


def hash_words(seeds: Seeds, positions: Positions) -> Seeds:
    """One 64-bit word per (seed, position); the two broadcast against each other.

    The seed is mixed before the counter is added: otherwise neighbouring seeds would see each other's
    streams shifted by one.
    """
    seeds = np.atleast_1d(seeds)
    counters = (np.atleast_1d(positions).astype(np.uint64) + np.uint64(1)) * GAMMA
    return mix(mix(seeds + GAMMA) + counters)


def uniforms(seeds: Seeds, positions: Positions) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, position)."""
    return (hash_words(seeds, positions) >> DROPPED_BITS).astype(np.float64) * UNIT


def uniform(seed: int, position: int) -> float:
    """The same number as `uniforms` gives, without arrays: ten times faster for a single one."""
    counter = (position + 1) * int(GAMMA)
    word = _mix_one(_mix_one(seed + int(GAMMA)) + counter)
    return (word >> int(DROPPED_BITS)) * UNIT


def _mix_one(word: int) -> int:
    word &= SEED_MASK
    word = ((word ^ (word >> int(SHIFT_1))) * int(MIX_1)) & SEED_MASK
    word = ((word ^ (word >> int(SHIFT_2))) * int(MIX_2)) & SEED_MASK
    return word ^ (word >> int(SHIFT_3))
