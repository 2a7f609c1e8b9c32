"""How often what may be drawn is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampling_rows import draw, logits, reference_kept, row

from engine.execution.sampler import Sampler


def chi_square(tokens, probabilities):
    """Pearson's statistic over tokens expected at least five times, and its degrees of freedom."""
    expected = np.asarray(probabilities) * len(tokens)
    observed = np.bincount(tokens, minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    big = expected >= 5
    statistic = ((observed[big] - expected[big]) ** 2 / expected[big]).sum()
    rest = expected[~big].sum()
    if rest > 1:
        statistic += (observed[~big].sum() - rest) ** 2 / rest
    return statistic, big.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 10},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    ],
)
@pytest.mark.parametrize("seed", [0, 123456789])
def test_frequencies_are_those_of_the_softmax(options, seed):
    values = logits(1, 64, seed=5, scale=1.5)
    tokens = draw(values, 10_000, seed=seed, **options)
    scores = ((values[0] - values.max()) / options.get("temperature", 1.0)).double()
    kept = reference_kept(
        scores.tolist(), top_k=options.get("top_k", 0), top_p=options.get("top_p", 1.0), min_p=options.get("min_p", 0.0)
    )
    mask = torch.tensor([i in kept for i in range(64)])
    statistic, freedom = chi_square(tokens, scores.masked_fill(~mask, -math.inf).softmax(-1).numpy())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4  # beyond the 99.99 % point


def test_rare_tokens_are_drawn_as_often_as_they_should():
    # 4,000 tokens of probability 2.5e-5 together make 10 %.
    values = torch.cat([torch.tensor([math.log(0.9)]), torch.full((4000,), math.log(0.1 / 4000))]).unsqueeze(0)
    tokens = np.concatenate([draw(values, 2000, seed=seed) for seed in range(5)])
    rare = (tokens > 0).sum()
    assert abs(rare - 1000) < 5 * math.sqrt(10_000 * 0.1 * 0.9)
    assert len(np.unique(tokens[tokens > 0])) > 800  # spread over the tokens


def test_positions_are_independent():
    values = torch.zeros(1, 8)
    tokens = draw(values, 20_000, seed=3)
    for lag in (1, 2, 5):
        pairs = tokens[lag:] * 8 + tokens[:-lag]
        statistic, freedom = chi_square(pairs, np.full(64, 1 / 64))
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_seeds_are_independent():
    sampler = Sampler(8, 8, [])
    count = 6_000
    values = torch.zeros(count, 8)
    drawn = {
        step: np.array([s.token_id for s in sampler(values, [row(9, seed=i * step) for i in range(count)])])
        for step in (1, -1, 2**32)
    }
    for tokens in drawn.values():
        statistic, freedom = chi_square(tokens, np.full(8, 1 / 8))
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)
        statistic, freedom = chi_square(tokens[1:] * 8 + tokens[:-1], np.full(64, 1 / 64))
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)
