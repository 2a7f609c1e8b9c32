from __future__ import annotations

import pytest

from engine.scheduling.block_pool import BlockPool


def published_blocks(pool: BlockPool, names: list[bytes]) -> list[int]:
    """Allocate a block for each name and publish it."""
    blocks = pool.allocate(len(names))
    assert [pool.publish(block, name) for block, name in zip(blocks, names, strict=True)] == blocks
    return blocks


def test_all_blocks_can_be_held_and_no_more() -> None:
    pool = BlockPool(3, block_size=4)
    assert sorted(pool.allocate(2) + pool.allocate(1)) == [0, 1, 2]
    with pytest.raises(ValueError, match="1 blocks asked for, 0 of 3 are free"):
        pool.allocate(1)
    assert pool.allocate(0) == []


def test_a_refused_allocation_changes_nothing() -> None:
    pool = BlockPool(3, block_size=4)
    held = pool.allocate(2)
    with pytest.raises(ValueError, match="2 blocks asked for"):
        pool.allocate(2)
    pool.check([held])
    assert pool.num_free == 1


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(9, block_size=4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_find_returns_the_longest_published_prefix() -> None:
    pool = BlockPool(4, block_size=2)
    a, b = published_blocks(pool, [b"a", b"b"])
    assert pool.find([b"a", b"b", b"c"]) == [a, b]
    assert pool.find([b"a", b"x", b"b"]) == [a]
    assert pool.find([b"x", b"a"]) == []


def test_released_blocks_stay_findable_until_reused_least_recently_used_first() -> None:
    pool = BlockPool(3, block_size=2)
    [a], [b], [c] = (published_blocks(pool, [name]) for name in (b"a", b"b", b"c"))
    for block in (b, a, c):
        pool.release([block])
    assert pool.num_free == 3
    pool.take([b])  # used again: now the most recently used
    pool.release([b])
    for block, name in ((a, b"a"), (c, b"c"), (b, b"b")):
        assert pool.find([name]) == [block]
        assert pool.allocate(1) == [block]
        assert pool.find([name]) == []


def test_the_tail_of_a_sequence_is_reused_before_its_head() -> None:
    pool = BlockPool(3, block_size=2)
    table = published_blocks(pool, [b"head", b"middle", b"tail"])
    pool.release(table)
    assert pool.allocate(3) == table[::-1]


def test_blocks_that_nobody_can_find_are_reused_first() -> None:
    pool = BlockPool(3, block_size=2)
    [cached] = published_blocks(pool, [b"cached"])
    pool.release([cached])
    private = pool.allocate(2)
    assert cached not in private
    pool.release(private)
    assert sorted(pool.allocate(2)) == sorted(private)
    assert pool.find([b"cached"]) == [cached]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2, block_size=2)
    table = published_blocks(pool, [b"a"])
    assert pool.count_free(table) == 0
    pool.take(table)
    pool.check([table, table])
    pool.release(table)
    assert pool.num_free == 1
    pool.release(table)
    assert pool.num_free == 2
    assert pool.count_free(table) == 1
    pool.check([])


def test_a_second_copy_of_published_tokens_is_given_back() -> None:
    pool = BlockPool(2, block_size=2)
    [first] = published_blocks(pool, [b"a"])
    [second] = pool.allocate(1)
    assert pool.publish(second, b"a") == first
    pool.check([[first], [first]])
    assert pool.allocate(1) == [second]


def test_a_second_copy_gives_way_to_a_free_first_one() -> None:
    pool = BlockPool(2, block_size=2)
    [first] = published_blocks(pool, [b"a"])
    pool.release([first])
    [second] = pool.allocate(1)
    assert pool.publish(second, b"a") == first
    pool.check([[first]])


def test_changes_are_net() -> None:
    pool = BlockPool(2, block_size=2)
    [a] = published_blocks(pool, [b"a"])
    assert pool.changes() == ([b"a"], [])
    assert pool.changes() == ([], [])
    pool.release([a])
    held = pool.allocate(2)
    pool.publish(held[0], b"a")  # gone, and there again in another block or the same
    pool.publish(held[1], b"b")
    pool.release(held[1:])
    pool.allocate(1)
    assert pool.changes() == ([], [])
    assert pool.published() == [b"a"]
    pool.release(held[:1])
    pool.allocate(1)
    assert pool.changes() == ([], [b"a"])


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1], [0]], [[0, 2]]])
def test_check_notices_tables_that_differ_from_the_books(tables: list[list[int]]) -> None:
    pool = BlockPool(3, block_size=2)
    assert pool.allocate(2) == [0, 1]
    pool.check([[0, 1]])
    with pytest.raises(RuntimeError, match="block"):
        pool.check(tables)
