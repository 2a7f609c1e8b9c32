"""The pieces of the CCQ encoder: codebooks, the search of a group, the pass and the descent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.compress import beam, scales
from engine.compress.codebook import CODE, PAIRS, WHOLE_RANGE, Codebook, gaussian_error
from engine.compress.descent import State, descend
from engine.compress.hessian import Metric
from engine.compress.words import Tables, search, smallest

CPU = torch.device("cpu")
K = 256


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(k: int = K) -> Metric:
    inputs = normal(4 * k, k, seed=1) @ (torch.eye(k) + 0.3 * normal(k, k, seed=2) / k**0.5)
    inputs += normal(4 * k, 1, seed=3)
    return Metric.of(inputs.T @ inputs, k, device=CPU)


def groups_of(factor: Tensor) -> Tensor:
    return torch.stack([factor[i : i + 64, i : i + 64] for i in range(0, len(factor), 64)])


def test_the_pairs_are_as_good_as_they_are_said_to_be() -> None:
    samples = normal(20_000, 4)
    errors = [gaussian_error(pair, samples) for pair in PAIRS]
    assert max(errors) < 0.112
    assert gaussian_error(CODE, samples) < 0.1105
    assert gaussian_error(WHOLE_RANGE, samples) > 0.155


def test_a_codebook_is_what_the_decoder_makes_of_a_pair() -> None:
    book = Codebook.of((120.8612, 548.348), device=CPU)
    for byte in (0, 1, 100, 255):
        word = int(byte * 120.8612 + 548.348 + 0.5)
        assert book.vectors[byte].tolist() == [((word >> shift) & 63) - 32 for shift in (9, 6, 3, 0)]


def test_smallest_finds_the_least_of_all_ways() -> None:
    distances = normal(50, 3 * 256).square() + 0.1
    expected = distances.sort(dim=1).values[:, :5]
    found = distances.gather(1, smallest(distances.clone(), 5))
    assert torch.allclose(found, expected, rtol=1e-3)


def test_a_single_word_is_chosen_as_by_trying_all() -> None:
    metric = correlated(64)
    book = Codebook.of(CODE, device=CPU)
    tables = Tables.of(book, metric.inverse_factor()[None])
    targets, factors = normal(20, 1, 64), torch.full((20,), 0.06)
    found = search(tables, 0, targets, torch.zeros(20, 1), factors)
    corner = torch.linalg.inv(metric.inverse_factor()[:4, :4])
    costs = ((targets[:, :, :4] - 0.06 * book.vectors) @ corner).square().sum(dim=-1)  # [20, 256]
    assert torch.equal(found.codes[:, 0, 0], costs.argmin(dim=1))


@pytest.mark.parametrize("beams", [1, 4])
def test_the_costs_of_a_group_are_its_true_error(beams: int) -> None:
    metric = correlated(64)
    book = Codebook.of(CODE, device=CPU)
    tables = Tables.of(book, metric.inverse_factor()[None])
    weights, factors = normal(20, 64), torch.full((20,), 0.06)
    found = search(tables, 0, weights[:, None], torch.zeros(20, 1), factors, beams=beams)
    assert found.codes.shape == (20, beams, 16)
    error = weights[:, None] - 0.06 * book.vectors[found.codes].flatten(2)  # [20, B, 64]
    true = torch.einsum("rbi,ij,rbj->rb", error, metric.matrix, error)
    assert torch.allclose(found.costs, true, rtol=1e-3)
    assert torch.allclose(found.errors.square().sum(dim=-1), true, rtol=1e-3)
    assert (found.costs.diff(dim=1) >= -1e-3 * found.costs[:, :1]).all()  # best first


@pytest.mark.parametrize("beams", [1, 4])
def test_a_pass_carries_errors_and_the_descent_never_loses(beams: int) -> None:
    metric, weight = correlated(), normal(24, K)
    book = Codebook.of(CODE, device=CPU)
    factor = metric.inverse_factor()
    guess = scales.guess(weight, book, torch.ones(K))
    supers = scales.super_of(guess, 13)
    levels = scales.levels_of(guess, supers)
    tables = Tables.of(book, groups_of(factor))

    def error(state: State) -> Tensor:
        off = weight - state.unscaled(book) * state.supers[:, None]
        return (off @ metric.matrix * off).sum(dim=1)

    alone = State(*beam.run(weight, tables, None, levels, supers, beams=beams), supers)
    carried = State(*beam.run(weight, tables, factor, levels, supers, beams=beams), supers)
    assert error(carried).sum() < error(alone).sum()
    blocks = Tables.of(book, torch.stack([Metric(h).inverse_factor() for h in groups_of(metric.matrix)]))
    before = error(carried)
    for _ in range(3):
        descend(weight, metric.matrix, blocks, carried, sweeps=1, beams=beams)
        after = error(carried)
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < before.sum()
        before = after
    assert torch.equal(carried.supers, carried.supers.bfloat16().float())
    assert carried.levels.min() >= 1
    assert carried.levels.max() <= 15


def test_a_guessed_scale_is_near_the_searched_one() -> None:
    book = Codebook.of(CODE, device=CPU)
    weight = normal(64, K) * torch.linspace(0.1, 2, K // 64).repeat_interleave(64)
    tables = Tables.of(book, torch.eye(64).expand(K // 64, -1, -1))
    ratio = scales.guess(weight, book, torch.ones(K)) / scales.searched(weight, tables)
    assert 0.9 < ratio.mean() < 1.1
    assert ratio.std() < 0.15
