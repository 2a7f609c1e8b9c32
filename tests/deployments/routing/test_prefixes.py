"""The inverted index against a set of hashes for each replica."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.routing.prefixes import PrefixIndex

NAMES = [bytes([i]) * 16 for i in range(12)]
names = st.lists(st.sampled_from(NAMES), max_size=8)


def brute_force(chain: list[bytes], limit: int, here: set[bytes]) -> int:
    depth = 0
    while depth < min(limit, len(chain)) and chain[depth] in here:
        depth += 1
    return depth


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from(["report", "expect", "unexpect", "clear"]), st.integers(0, 39), names, names)),
    st.lists(st.sampled_from(NAMES), unique=True, max_size=12),
    st.integers(0, 12),
)
def test_index_equals_brute_force(slots, acts, chain, limit):
    index = PrefixIndex()
    index.open(slots - 1)
    reported = [set() for _ in range(slots)]
    expected: list[list[list[bytes]]] = [[] for _ in range(slots)]
    for act, number, first, second in acts:
        slot = number % slots
        if act == "report":
            index.report(slot, first, second)
            reported[slot] = (reported[slot] | set(first)) - set(second)
        elif act == "expect":
            index.expect(slot, first)
            expected[slot].append(first)
        elif act == "unexpect" and expected[slot]:
            index.unexpect(slot, expected[slot].pop())
        elif act == "clear":
            index.clear(slot)
            reported[slot], expected[slot] = set(), []
    here = [
        known | {name for hashes in sent for name in hashes} for known, sent in zip(reported, expected, strict=True)
    ]
    depths = index.match(chain, limit, slots)
    found = np.zeros(slots) if depths is None else depths
    assert found.tolist() == [brute_force(chain, limit, one) for one in here]
    assert len(index) == len(set().union(*here))


def test_long_chains_of_many_replicas():
    chain = [i.to_bytes(16, "little") for i in range(300)]
    index = PrefixIndex()
    index.open(99)
    for slot in range(100):
        index.report(slot, chain[: 3 * slot], [])
    depths = index.match(chain, 290, 100)
    assert depths is not None
    assert depths.tolist() == [min(3 * slot, 290) for slot in range(100)]
