"""Routing, and pairs sorted by expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.gpu import routing

torch.set_num_threads(1)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 64, 8), (5, 7, 3), (3, 4, 4), (0, 4, 2)])
def test_route_is_the_reference(tokens, experts, top_k, corrected):
    torch.manual_seed(tokens)
    x, gate = torch.randn(tokens, 32), torch.randn(experts, 32)
    bias = torch.randn(experts) * 0.1 if corrected else None
    weights, ids = routing.route(x, gate, bias, top_k=top_k, norm_min=1e-12)
    want, chosen = reference.route(x, gate, bias, top_k=top_k, norm_min=1e-12)
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, want)


def test_equal_scores_go_to_the_lower_expert():
    weights, ids = routing.route(torch.ones(2, 4), torch.zeros(6, 4), None, top_k=4, norm_min=1e-12)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))


def test_small_sums_are_divided_by_the_least_divisor():
    weights, _ = routing.route(torch.ones(1, 4), torch.zeros(8, 4), None, top_k=2, norm_min=0.5)
    torch.testing.assert_close(weights, torch.full((1, 2), 0.25))  # 1/8 by 0.5, not by 1/4


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 60),
    experts=st.integers(1, 12),
    used=st.integers(1, 12),
    block=st.sampled_from([8, 16]),
    in_one=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pairs_stand_in_blocks_of_their_expert(tokens, experts, used, block, in_one, seed):
    """Each pair once, blocks of one expert, stable, unused blocks last; with one program and with torch."""
    torch.manual_seed(seed)
    top_k = min(3, experts, used)
    choices = min(experts, used)  # the other experts get nothing
    ids = torch.stack([torch.randperm(choices)[:top_k] for _ in range(tokens)])
    pairs = ids.numel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "ONE_PROGRAM", 256 if in_one else 0)
        slots, owners = routing.sort_pairs(ids, experts=experts, block=block)
    assert slots.shape == (routing.max_blocks(pairs, experts, block), block)
    held = slots < pairs
    assert sorted(slots[held].tolist()) == list(range(pairs))
    assert torch.equal(held.any(dim=1), owners >= 0)
    assert owners.tolist() == sorted(owners.tolist(), key=lambda owner: (owner < 0, owner))
    flat = ids.flatten()
    for expert in range(experts):
        mine = slots[owners == expert]
        assert mine[mine < pairs].tolist() == torch.nonzero(flat == expert).flatten().tolist()
        assert (mine < pairs).flatten().tolist() == [True] * int((flat == expert).sum()) + [False] * int(
            (mine >= pairs).sum()
        )
