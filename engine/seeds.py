"""Integer mixing for seeds; plain Python, so that processes without torch can use it."""

from __future__ import annotations

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the step of a SplitMix64 stream
MULTIPLY_1 = 0xBF58476D1CE4E5B9
MULTIPLY_2 = 0x94D049BB133111EB


def mix(value: int) -> int:
    """The SplitMix64 finalizer (Steele, Lea, Flood, OOPSLA 2014) on ``value`` modulo 2^64; returns 0 .. 2^64-1."""
    value &= MASK
    value = ((value ^ (value >> 30)) * MULTIPLY_1) & MASK
    value = ((value ^ (value >> 27)) * MULTIPLY_2) & MASK
    return value ^ (value >> 31)


def signed(value: int) -> int:
    """The signed 64-bit integer with the bits of ``value`` (0 .. 2^64-1)."""
    return value - (1 << 64) if value >> 63 else value


def choice_seed(seed: int, choice: int) -> int:
    """Seed of choice ``choice`` (from 0) of a request with ``seed``; signed 64-bit, as ``seed`` itself is.

    Choice 0 keeps the seed, so ``n=1`` and the first of ``n`` choices are the same text. Choice i > 0 takes
    ``mix(mix(seed) + i)``.
    """
    return seed if choice == 0 else signed(mix(mix(seed) + choice))
