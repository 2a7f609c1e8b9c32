"""Noise is a pure function of (seed, position, token id), the same bits everywhere, and standard Gumbel."""

import math

import numpy as np
import torch

from engine.execution.noise import gumbel, hash_bits, row_keys
from engine.seeds import GAMMA, choice_seed, mix, signed

CPU = torch.device("cpu")
EULER_GAMMA = 0.5772156649


def test_splitmix64_gives_the_published_sequence():
    # First outputs of the reference C code (prng.di.unimi.it/splitmix64.c) for state 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [mix(1234567 + (i + 1) * GAMMA) for i in range(5)] == expected
    bits = hash_bits(torch.tensor([1234567]), torch.arange(5))
    assert bits[0].tolist() == [signed(value) for value in expected]


def test_tensor_hash_equals_plain_integers_for_any_seed_and_position():
    rng = np.random.default_rng(0)
    seeds = [*map(int, rng.integers(-(2**63), 2**63 - 1, size=20)), 0, -1, 2**63 - 1, -(2**63)]
    positions = [*map(int, rng.integers(0, 2**20, size=20)), 0, 1, 2, 131071]
    tokens = torch.tensor([0, 1, 17, 103423])
    keys = row_keys(seeds, positions, CPU)
    bits = hash_bits(keys, tokens)
    for i, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        key = mix(mix(seed) + position * GAMMA)
        assert signed(key) == int(keys[i])
        assert bits[i].tolist() == [signed(mix(key + (token + 1) * GAMMA)) for token in tokens.tolist()]


def test_noise_at_a_token_does_not_depend_on_which_tokens_are_asked_for():
    keys = row_keys([3, 4], [10, 11], CPU)
    whole = gumbel(keys, torch.arange(1000))
    some = torch.tensor([[999, 5, 17], [0, 1, 998]])
    assert torch.equal(gumbel(keys, some), whole.gather(1, some))
    assert torch.equal(gumbel(keys[1:], torch.arange(1000)), whole[1:])


def test_noise_is_finite_and_gumbel_distributed():
    noise = gumbel(row_keys(range(64), [5] * 64, CPU), torch.arange(8192)).double()
    assert torch.isfinite(noise).all()
    count = noise.numel()
    # Mean: Euler's constant; variance: pi^2 / 6. Bounds at five standard errors.
    assert abs(noise.mean().item() - EULER_GAMMA) < 5 * math.sqrt(math.pi**2 / 6 / count)
    assert abs(noise.var().item() - math.pi**2 / 6) < 5 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / count)
    # Kolmogorov-Smirnov against exp(-exp(-x)); 1.95 / sqrt(n) is the 0.1 % point.
    ordered = noise.flatten().sort().values
    gap = (torch.exp(-torch.exp(-ordered)) - torch.arange(1, count + 1) / count).abs().max().item()
    assert gap < 1.95 / math.sqrt(count)


def test_positions_seeds_and_tokens_are_uncorrelated():
    tokens = torch.arange(50_000)
    rows = gumbel(row_keys([7, 7, 7, 8, -7, 9], [0, 1, 2, 0, 0, 100], CPU), tokens)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max().item() < 5 / math.sqrt(len(tokens))
    for lag in (1, 2, 13, 64):
        neighbours = torch.corrcoef(torch.stack([rows[0, lag:], rows[0, :-lag]]))[0, 1]
        assert abs(neighbours.item()) < 5 / math.sqrt(len(tokens))


def test_seed_plus_one_is_not_position_plus_one():
    keys = row_keys([0, 1, 0], [1, 0, 2], CPU).tolist()
    assert len(set(keys)) == 3


def test_choice_seeds_differ_and_choice_zero_keeps_the_seed():
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        seeds = [choice_seed(seed, i) for i in range(128)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 128
        assert all(-(2**63) <= value < 2**63 for value in seeds)
    assert not {choice_seed(1, i) for i in range(128)} & {choice_seed(2, i) for i in range(128)}
