"""What may be drawn, by the definitions of top_k, top_p and min_p."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sampling_rows import logits, reference_kept

from engine.execution.filters import HEAD, Filter, candidates, sorted_candidates


def kept_sets(scores, filters):
    found = {}
    for part in candidates(scores, filters):
        ids = part.token_ids.expand(part.scores.shape)
        for j, i in enumerate(part.rows.tolist()):
            assert i not in found
            if part.settled is None or part.settled[j]:
                found[i] = set(ids[j][part.scores[j] > -math.inf].tolist())
            else:
                whole = sorted_candidates(scores[i : i + 1], [filters[i]])
                found[i] = set(whole.token_ids[whole.scores[0] > -math.inf].tolist())
    return found


@settings(deadline=None, max_examples=100)
@example(vocab=HEAD + 1, scale=0.01, steps=None, seed=0, options=[(HEAD + 1, 0.3, 0.0)])  # top_k beyond the head
@example(vocab=900, scale=0.0, steps=None, seed=0, options=[(50, 0.3, 0.0)])  # equals of the k-th beyond the head
@example(vocab=900, scale=0.1, steps=None, seed=0, options=[(HEAD + 1, 0.1, 0.7), (HEAD, 0.9, 0.7), (300, 1.0, 0.9)])
@given(
    vocab=st.sampled_from([1, 7, HEAD - 1, HEAD, HEAD + 1, 900]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 6.0]),
    steps=st.sampled_from([None, 4]),
    seed=st.integers(0, 2**31),
    options=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 50, HEAD - 1, HEAD, HEAD + 1, 10_000]),
            st.sampled_from([1.0, 1e-6, 0.3, 0.9, 0.999]),
            st.sampled_from([0.0, 1e-3, 0.2, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_kept_sets_are_exact(vocab, scale, steps, seed, options):
    scores = logits(len(options), vocab, seed, scale)
    if steps:  # many equal scores
        scores = (scores * steps).round() / steps
    scores = scores - scores.max(dim=-1, keepdim=True).values
    filters = [Filter(*option) for option in options]
    found = kept_sets(scores, filters)
    assert set(found) == set(range(len(options)))
    for i, kept in enumerate(filters):
        values = scores[i].tolist()
        expected = reference_kept(values, top_k=kept.top_k, top_p=kept.top_p, min_p=kept.min_p)
        difference = found[i] ^ expected
        # Where a sum of probabilities hits top_p to the last bits, one score more or less is right.
        assert not difference or (kept.top_p < 1 and borderline(values, kept, difference))


def borderline(scores, kept, difference):
    lower = reference_kept(scores, top_k=kept.top_k, top_p=max(kept.top_p - 2e-6, 1e-9), min_p=kept.min_p)
    upper = reference_kept(scores, top_k=kept.top_k, top_p=min(kept.top_p + 2e-6, 0.9999999), min_p=kept.min_p)
    return difference <= upper - lower


def test_top_p_keeps_the_token_that_reaches_it_and_no_more():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    scores = scores - scores[:, :1]
    for top_p, count in ((0.4, 1), (0.499, 1), (0.501, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        assert kept_sets(scores, [Filter(0, top_p, 0.0)]) == {0: set(range(count))}


def test_top_p_counts_what_top_k_left():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    scores = scores - scores[:, :1]
    # Of the first two, the first has 4/7 = 0.571.
    assert kept_sets(scores, [Filter(2, 0.57, 0.0), Filter(2, 0.58, 0.0)][:1]) == {0: {0}}
    assert kept_sets(scores, [Filter(2, 0.58, 0.0)]) == {0: {0, 1}}
