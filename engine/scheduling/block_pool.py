"""The pages of the KV cache: who holds them, which are free, and which hold a prefix that can be found again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Fixed-size pages with reference counts and a prefix cache. Pure bookkeeping: it never sees a tensor.

    A block is *held* (by as many requests as its reference count says) or *free*. A full block whose tokens have been
    computed may be *published* under its hash (:mod:`engine.scheduling.prefix`); it can be found while it is held and
    afterwards, until it is allocated anew. Free blocks are allocated least recently used first; those that nobody can
    find go first of all. Every operation is O(1) for each block concerned.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be allocated first
        self._changes: dict[bytes, bool] = {}  # hashes whose state differs from when last told -> can be found now

    @property
    def num_free(self) -> int:
        """Blocks that no request holds, published ones included."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks ``num_tokens`` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest prefix of a hash chain. They stay as they are; see :meth:`take`."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._published.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def count_free(self, block_ids: Iterable[int]) -> int:
        """How many of ``block_ids`` no request holds, so that taking them lowers :attr:`num_free`."""
        return sum(block_id in self._free for block_id in block_ids)

    def take(self, block_ids: Iterable[int]) -> None:
        """Hold published blocks once more."""
        for block_id in block_ids:
            self._free.pop(block_id, None)
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Hold ``count`` free blocks; what was published in them can no longer be found.

        Raises:
            ValueError: fewer than ``count`` blocks are free. Nothing has changed then.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            evicted = self._hashes[block_id]
            if evicted is not None:
                del self._published[evicted]
                self._hashes[block_id] = None
                self._change(evicted, findable=False)
        return block_ids

    def publish(self, block_id: int, block_hash: bytes) -> int:
        """Let a held block, now full and computed, be found under ``block_hash``.

        Returns:
            The block to use from now on. It is another one than ``block_id`` if the same tokens have been published
            already (two requests computed them in the same step): the caller's hold has then moved to that block.
        """
        known = self._published.setdefault(block_hash, block_id)
        if known != block_id:
            self.take([known])
            self.release([block_id])
        elif self._hashes[block_id] is None:
            self._hashes[block_id] = block_hash
            self._change(block_hash, findable=True)
        return known

    def published(self) -> list[bytes]:
        """The hashes of all blocks that can be found, in O(blocks)."""
        return list(self._published)

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes that can be found since the last call, and hashes that can't be found any more.

        These are net: a block that was published and evicted in between, or evicted and published anew, is in neither.
        So whoever adds the one and takes off the other, in either order, has what :meth:`published` returns.
        """
        if not self._changes:
            return [], []
        cached = [block_hash for block_hash, findable in self._changes.items() if findable]
        evicted = [block_hash for block_hash, findable in self._changes.items() if not findable]
        self._changes.clear()
        return cached, evicted

    def release(self, block_table: Sequence[int]) -> None:
        """Let go of the blocks of one request, its tail first: a prefix is worth more than what follows it."""
        for block_id in reversed(block_table):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Check the books against the block tables of all requests that hold blocks, in O(blocks).

        Raises:
            RuntimeError: a block is lost, held by more or fewer requests than counted, or published wrongly.
        """
        held = Counter(block_id for block_table in block_tables for block_id in block_table)
        for block_id, ref_count in enumerate(self._ref_counts):
            if ref_count != held[block_id]:
                raise RuntimeError(f"block {block_id}: {held[block_id]} requests hold it, {ref_count} are counted")
            if (ref_count == 0) != (block_id in self._free):
                raise RuntimeError(f"block {block_id}: {ref_count} holds, but free is {block_id in self._free}")
        if len(self._free) + len(held) != self.num_blocks:
            raise RuntimeError(f"{len(self._free)} free and {len(held)} held blocks of {self.num_blocks}")
        published = {name: block_id for block_id, name in enumerate(self._hashes) if name is not None}
        if published != self._published or len(published) != len(self._hashes) - self._hashes.count(None):
            raise RuntimeError("published blocks and their hashes disagree")

    def _change(self, block_hash: bytes, *, findable: bool) -> None:
        # A hash goes back and forth between two states, so a second change undoes the first.
        if self._changes.pop(block_hash, None) is None:
            self._changes[block_hash] = findable
