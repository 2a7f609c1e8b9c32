"""Batches over a paged cache, for tests of attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from kernels.cache import SCALE_DTYPE, LayerCache

CPU = torch.device("cpu")


def empty_cache(num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> LayerCache:
    """A cache in which every slot holds large numbers, so that looking at an unused one shows; int8 with scales."""
    filling = 100 if dtype == torch.int8 else 1e4
    pages = torch.full((2, num_blocks, block_size, kv_heads, head_dim), filling, dtype=dtype)
    if dtype != torch.int8:
        return LayerCache(*pages)
    return LayerCache(*pages, *torch.full((2, num_blocks, kv_heads, block_size), 100.0, dtype=SCALE_DTYPE))


class Batch:
    """Requests of (new tokens, context) each, their keys and values stored in blocks that stand in no order.

    Args:
        requests: (new tokens, tokens of the context with them).
        heads: (kv heads, query heads a kv head).
        head_dim: D.
        block_size: positions in a block.
        dtype: of queries, keys and values.
        cache_dtype: of the cache.
        seed: of everything random.
    """

    def __init__(
        self,
        requests: Sequence[tuple[int, int]],
        heads: tuple[int, int],
        *,
        head_dim: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        kv_heads, group = heads
        self.block_size, self.dtype = block_size, dtype
        counts = [-(-context // block_size) for _, context in requests]
        num_blocks = sum(counts) + 2
        self.cache = empty_cache(num_blocks, block_size, kv_heads, head_dim, cache_dtype or dtype)
        self.exact = empty_cache(num_blocks, block_size, kv_heads, head_dim, dtype)
        """The same keys and values, never quantized."""
        free = torch.randperm(num_blocks, generator=generator).tolist()
        self.block_tables = np.zeros((len(requests), max(counts) + 1), dtype=np.int32)
        for r, (_, context) in enumerate(requests):
            blocks = [free.pop() for _ in range(counts[r])]
            self.block_tables[r, : counts[r]] = blocks
            positions = torch.arange(context)
            slots = torch.tensor(blocks)[positions // block_size] * block_size + positions % block_size
            k, v = (torch.randn(context, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
            for cache in (self.cache, self.exact):
                reference.store_kv(k, v, cache, slots)
        self.query_start = np.cumsum([0, *(count for count, _ in requests)], dtype=np.int32)
        self.context_lens = np.array([context for _, context in requests], dtype=np.int32)
        tokens, width = int(self.query_start[-1]), kv_heads * group
        # As in the model, queries may be part of a wider tensor.
        self.q = torch.randn(tokens, width + 2, head_dim, generator=generator).to(dtype)[:, :width]

    def metadata(self, kernels):
        return kernels.attention_metadata(
            self.block_tables,
            self.query_start,
            self.context_lens,
            block_size=self.block_size,
            dtype=self.dtype,
            device=CPU,
        )

    def expected(self, cache: LayerCache | None = None, *, scale: float) -> Tensor:
        return reference.paged_attention(self.q, cache or self.cache, self.metadata(reference), scale=scale)
