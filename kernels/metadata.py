"""What paged attention must know about a flat batch; the same for all layers of a step, so made once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each of R requests' queries stand in the flat batch, and where its keys stand in the cache.

    Attributes:
        block_tables: int32 [R, max_blocks]; entry j is the cache block of positions ``j * block_size ...``;
            entries beyond the context are not read.
        query_start: int32 [R + 1]; request r owns rows ``query_start[r] : query_start[r + 1]``, at least one.
        context_lens: int32 [R]; tokens in the cache after this step's were stored. The last query of request r is at
            position ``context_lens[r] - 1``.
        block_size: positions in a block.
    """

    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_size: int
