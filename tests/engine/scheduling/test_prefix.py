from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.prefix import HASH_BYTES, block_hash, extend_hashes

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=30)


def chain(tokens: list[int], block_size: int) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, block_size)
    return hashes


@settings(deadline=None)
@given(token_ids, token_ids, st.integers(1, 6))
def test_hashes_are_equal_exactly_as_far_as_the_tokens_are(a: list[int], b: list[int], block_size: int) -> None:
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    hashes_a, hashes_b = chain(a, block_size), chain(b, block_size)
    assert len(hashes_a) == len(a) // block_size
    for i, (x, y) in enumerate(zip(hashes_a, hashes_b, strict=False)):
        assert (x == y) == ((i + 1) * block_size <= common)


@settings(deadline=None)
@given(token_ids, st.integers(1, 6), st.integers(0, 30))
def test_a_chain_may_grow_with_its_tokens(tokens: list[int], block_size: int, split: int) -> None:
    hashes = chain(tokens[:split], block_size)
    extend_hashes(hashes, tokens, block_size)
    assert hashes == chain(tokens, block_size)


def test_a_hash_names_the_tokens_and_all_before_them() -> None:
    first = block_hash(b"", [1, 2])
    assert len(first) == HASH_BYTES
    assert first == block_hash(b"", [1, 2])
    assert (
        len({first, block_hash(b"", [2, 1]), block_hash(first, [1, 2]), block_hash(block_hash(b"", [3, 4]), [1, 2])})
        == 4
    )
