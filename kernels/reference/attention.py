"""Causal attention over a paged key-value cache, one request after the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.reference.cache import read_blocks


def attention_metadata(
    block_tables: np.ndarray,
    query_start: np.ndarray,
    context_lens: np.ndarray,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionMetadata:
    """The arrays as tensors on `device`."""
    tables, starts, lengths = (torch.from_numpy(a).to(device) for a in (block_tables, query_start, context_lens))
    return AttentionMetadata(tables, starts, lengths, block_size)


def decode_metadata(
    block_tables: Tensor, query_start: Tensor, context_lens: Tensor, *, block_size: int, dtype: torch.dtype
) -> AttentionMetadata:
    """The tensors as they are."""
    return AttentionMetadata(block_tables, query_start, context_lens, block_size)


def paged_attention(q: Tensor, cache: LayerCache, metadata: AttentionMetadata, *, scale: float) -> Tensor:
    """Softmax in fp32 over the keys at or before each query's position."""
    heads, kv_heads = q.shape[1], cache.num_kv_heads
    starts, contexts = metadata.query_start.tolist(), metadata.context_lens.tolist()
    out = torch.empty_like(q)
    for r, context in enumerate(contexts):
        rows = slice(starts[r], starts[r + 1])
        blocks = metadata.block_tables[r, : -(-context // metadata.block_size)].long()
        keys = read_blocks(cache.keys, cache.key_scales, blocks, torch.float32)[:context]  # [L, Hkv, D]
        values = read_blocks(cache.values, cache.value_scales, blocks, torch.float32)[:context]
        queries = q[rows].float().reshape(-1, kv_heads, heads // kv_heads, q.shape[2])  # [n, Hkv, G, D]
        scores = torch.einsum("nhgd,lhd->hgnl", queries, keys) * scale
        count = rows.stop - rows.start
        positions = torch.arange(context - count, context, device=q.device)
        hidden = torch.arange(context, device=q.device) > positions.unsqueeze(1)  # [n, L]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[rows] = torch.einsum("hgnl,lhd->nhgd", weights, values).flatten(1, 2).to(q.dtype)
    return out
