"""The cache blocks of requests: found by their prefix, allocated as they grow, made findable, and let go of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, takewhile

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.part import ScheduledRequest
from engine.scheduling.prefix import extend_hashes
from engine.scheduling.request import Request


class BlockTables:
    """Writes the ``block_table`` of requests, and keeps their hashes; without prefix caching nothing is ever found."""

    def __init__(self, pool: BlockPool, *, enable_prefix_caching: bool) -> None:
        self._pool = pool
        self._enable_prefix_caching = enable_prefix_caching

    def find_prefix(self, request: Request) -> list[int]:
        """The cached blocks of those first tokens that need not be computed."""
        if not self._enable_prefix_caching:
            return []
        extend_hashes(request.block_hashes, request.all_token_ids, self._pool.block_size)
        return self._pool.find(islice(request.block_hashes, request.num_skippable_tokens // self._pool.block_size))

    def has_room(self, request: Request, cached: list[int], *, spare: int) -> bool:
        """Whether all known tokens of a request fit, whose prefix was found, and leave so many blocks free."""
        num_blocks = self._pool.blocks_for(request.num_tokens) - len(cached) + self._pool.count_free(cached)
        return num_blocks + spare <= self._pool.num_free

    def start(self, request: Request, cached: list[int], num_new_tokens: int) -> None:
        """Give a request the blocks of its prefix that were found, and those for its next tokens."""
        self._pool.take(cached)
        request.num_computed_tokens = len(cached) * self._pool.block_size
        request.num_published_blocks = len(cached)
        num_blocks = self._pool.blocks_for(request.num_computed_tokens + num_new_tokens) - len(cached)
        request.block_table.extend(cached + self._pool.allocate(num_blocks))

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Give a request blocks for its first ``num_tokens`` tokens; False, and none, if there are not enough."""
        num_blocks = self._pool.blocks_for(num_tokens) - len(request.block_table)
        if num_blocks > self._pool.num_free:
            return False
        request.block_table.extend(self._pool.allocate(num_blocks))
        return True

    def publish(self, request: Request) -> None:
        """Make the full, computed blocks of a request findable."""
        if not self._enable_prefix_caching:
            return
        num_full = request.num_computed_tokens // self._pool.block_size
        if num_full > len(request.block_hashes):
            extend_hashes(request.block_hashes, request.all_token_ids, self._pool.block_size)
        for i in range(request.num_published_blocks, num_full):
            request.block_table[i] = self._pool.publish(request.block_table[i], request.block_hashes[i])
        request.num_published_blocks = num_full

    def release(self, request: Request) -> None:
        """Let go of a request's blocks; those published stay findable until they are needed."""
        self._pool.release(request.block_table)
        del request.block_table[:]

    def coming(self, scheduled: Iterable[ScheduledRequest]) -> set[bytes]:
        """Hashes of the blocks that can be found after a step of these parts, decoded ones left out."""
        if not self._enable_prefix_caching:
            return set()
        size = self._pool.block_size
        return {
            block_hash
            for part in scheduled
            if part.prefills
            for block_hash in part.request.block_hashes[part.start // size : part.end // size]
        }

    def is_mostly_coming(self, request: Request, coming: set[bytes], cached: list[int]) -> bool:
        """Whether at least half of the tokens that are new in a waiting request are in blocks that are coming."""
        size = self._pool.block_size
        wanted = islice(request.block_hashes, len(cached), request.num_skippable_tokens // size)
        num_coming = sum(1 for _ in takewhile(coming.__contains__, wanted)) * size
        return 2 * num_coming >= request.num_tokens - len(cached) * size
