"""Search for CCQ codebooks: pairs (code_scale, code_zp) whose 256 vectors quantize Gaussian words well.

    python benchmarks/codebooks.py                # measure engine.compress.codebook.PAIRS and the whole-range pair
    python benchmarks/codebooks.py --seconds 400  # random pairs, then the best of them moved a little again and again

A pair acts like a random seed, so most of the search is chance; small moves of the best pairs do the rest. The error is
the mean squared error of unit Gaussian words under one real scale, on 100,000 words the search has not seen.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from engine.compress.codebook import PAIRS, WHOLE_RANGE, Pair, gaussian_error

KEPT = 40
SCREEN = (0.92, 1.0, 2)
"""The two scales a pair is looked at under first."""
CLOSE = (0.9, 0.96, 2)


def words(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def single(value: float) -> float:
    """As the file holds it."""
    return float(torch.tensor(value, dtype=torch.float32))


def scatter(seconds: float, rng: random.Random) -> list[tuple[float, Pair]]:
    """The best of random pairs: those whose words stay in 15 bits, and those that wrap."""
    few, more = words(512, 1), words(8192, 2)
    pool: list[tuple[float, Pair]] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if rng.random() < 0.4:
            scale = single(rng.uniform(100, 128))
            pair = (scale, single(rng.uniform(0, 2**15 - 255 * scale)))
        else:
            pair = (single(rng.uniform(0, 2**14)), single(rng.uniform(0, 2**15)))
        error = gaussian_error(pair, few, scales=SCREEN)
        if len(pool) < 8 * KEPT or error < pool[-1][0]:
            pool = sorted([*pool, (error, pair)])[: 8 * KEPT]
    return sorted((gaussian_error(pair, more), pair) for _, pair in pool)[:KEPT]


def climb(pool: list[tuple[float, Pair]], seconds: float, rng: random.Random) -> list[Pair]:
    """Move pairs, the better ones more often, and keep what is better."""
    more = words(8192, 2)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        i = int(rng.random() ** 2 * len(pool))
        error, (scale, zero) = pool[i]
        width, shift = 10 ** rng.uniform(-4, 0.3), 10 ** rng.uniform(-1, 3)
        move = rng.uniform(-width, width) * (rng.random() < 0.8)
        moved = (single(scale + move), single(zero + rng.uniform(-shift, shift) - 128 * move * (rng.random() < 0.7)))
        if gaussian_error(moved, more[:2048], scales=CLOSE) < error + 8e-4:
            better = gaussian_error(moved, more)
            if better < error:
                pool[i] = (better, moved)
                pool.sort()
    return [pair for _, pair in pool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.0, help="of search; 0 measures the known pairs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs: list[Pair] = [WHOLE_RANGE, *PAIRS]
    if arguments.seconds > 0:
        rng = random.Random(arguments.seed)
        known = [(gaussian_error(pair, words(8192, 2)), pair) for pair in PAIRS]
        pool = sorted([*scatter(0.4 * arguments.seconds, rng), *known])
        pairs += climb(pool, 0.6 * arguments.seconds, rng)[:12]
    fresh = words(100_000, 3)
    for error, pair in sorted((gaussian_error(pair, fresh), pair) for pair in dict.fromkeys(pairs)):
        print(f"{error:.5f}  {10 * math.log10(1 / error):.2f} dB  {pair}")


if __name__ == "__main__":
    main()
