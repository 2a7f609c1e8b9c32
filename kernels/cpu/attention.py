"""Paged attention on a CPU: gather the pages of a request, then torch's fused attention.

Requests with one query (decoding) go together, padded to the longest of their group; a group's contexts differ by less
than a factor of two in blocks, so padding never doubles the work. Requests with several queries (prefill) go
one by one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.reference.cache import read_blocks

QUERY_TILE = 256
"""Queries at a time where a prefill chunk continues a context: bounds the mask to QUERY_TILE x context."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Requests with one query each and contexts of similar length."""

    rows: Tensor | None
    """int64 [R], rows of the flat batch; None when they are all its rows, in order."""
    blocks: Tensor
    """int64 [R * max_blocks]."""
    context: int
    """Keys to look at, the longest of the group."""
    mask: Tensor | None
    """[R, 1, 1, context], 0 or -inf; None when all contexts are equally long."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """A request with several queries."""

    start: int
    end: int
    """Rows of the flat batch."""
    blocks: Tensor
    """int64 [blocks of the context]."""
    context: int


@dataclass(frozen=True, slots=True)
class CpuAttentionMetadata(AttentionMetadata):
    """The batch, divided into groups once for all layers."""

    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[Prefill, ...]
    tail_mask: Tensor | None
    """[QUERY_TILE, longest context], causal and aligned at the lower right: its lower right n x L corner is the mask
    of the last n queries of a context of L; None when no chunk continues a context."""


def attention_metadata(
    block_tables: np.ndarray,
    query_start: np.ndarray,
    context_lens: np.ndarray,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> CpuAttentionMetadata:
    """Divide the batch into decode groups and prefills; see `ops.attention_metadata`."""
    counts = np.diff(query_start)
    single = counts == 1
    num_blocks = -(-context_lens // block_size)
    groups: dict[int, list[int]] = defaultdict(list)
    for r in np.flatnonzero(single).tolist():
        groups[int(num_blocks[r]).bit_length()].append(r)
    decodes = tuple(
        _decode_group(np.asarray(members), block_tables, query_start, context_lens, num_blocks, dtype)
        for _, members in sorted(groups.items())
    )
    prefills = []
    longest = 0
    for r in np.flatnonzero(~single).tolist():
        start, end, context = int(query_start[r]), int(query_start[r + 1]), int(context_lens[r])
        blocks = torch.from_numpy(block_tables[r, : num_blocks[r]].astype(np.int64))
        prefills.append(Prefill(start, end, blocks, context))
        if context > end - start:
            longest = max(longest, context)
    return CpuAttentionMetadata(
        block_tables=torch.from_numpy(block_tables),
        query_start=torch.from_numpy(query_start),
        context_lens=torch.from_numpy(context_lens),
        block_size=block_size,
        decodes=decodes,
        prefills=tuple(prefills),
        tail_mask=_tail_mask(longest, dtype) if longest else None,
    )


def decode_metadata(
    block_tables: Tensor, query_start: Tensor, context_lens: Tensor, *, block_size: int, dtype: torch.dtype
) -> CpuAttentionMetadata:
    """Divide the batch by the values that the tensors hold now; see `ops.decode_metadata`."""
    arrays = (tensor.numpy() for tensor in (block_tables, query_start, context_lens))
    return attention_metadata(*arrays, block_size=block_size, dtype=dtype, device=block_tables.device)


def _decode_group(
    members: np.ndarray,
    block_tables: np.ndarray,
    query_start: np.ndarray,
    context_lens: np.ndarray,
    num_blocks: np.ndarray,
    dtype: torch.dtype,
) -> DecodeGroup:
    contexts = context_lens[members]
    longest = int(contexts.max())
    tables = block_tables[members, : int(num_blocks[members].max())].astype(np.int64)  # [R, max_blocks]
    whole = len(members) == int(query_start[-1])
    mask = None
    if int(contexts.min()) < longest:
        visible = np.arange(longest) < contexts[:, None]  # [R, context]
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(torch.from_numpy(~visible), float("-inf"))
        mask = mask.view(len(members), 1, 1, longest)
    rows = None if whole else torch.from_numpy(query_start[members].astype(np.int64))
    return DecodeGroup(rows, torch.from_numpy(tables.reshape(-1)), longest, mask)


def _tail_mask(context: int, dtype: torch.dtype) -> Tensor:
    tile = min(QUERY_TILE, context)
    return torch.full((tile, context), float("-inf"), dtype=dtype).triu_(context - tile + 1)


def paged_attention(q: Tensor, cache: LayerCache, metadata: AttentionMetadata, *, scale: float) -> Tensor:
    """See `ops.paged_attention`.

    Raises:
        TypeError: the metadata was made for another device.
    """
    if not isinstance(metadata, CpuAttentionMetadata):
        raise TypeError(f"{type(metadata).__name__} was made for another device; use ops.attention_metadata")
    if len(metadata.decodes) == 1 and metadata.decodes[0].rows is None:
        return _decode(q, cache, metadata.decodes[0], scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    for group in metadata.decodes:
        if group.rows is not None:
            queries = q.index_select(0, group.rows)
            out.index_copy_(0, group.rows, _decode(queries, cache, group, scale))
    for prefill in metadata.prefills:
        queries = q[prefill.start : prefill.end]
        out[prefill.start : prefill.end] = _prefill(queries, cache, prefill, metadata.tail_mask, scale)
    return out


def _decode(q: Tensor, cache: LayerCache, group: DecodeGroup, scale: float) -> Tensor:
    requests, heads, head_dim = q.shape
    kv_heads = cache.num_kv_heads
    shape = (requests, -1, kv_heads, head_dim)
    k, v = (
        read_blocks(pages, scales, group.blocks, q.dtype)
        .view(shape)[:, : group.context].transpose(1, 2)  # [R, Hkv, L, D]
        for pages, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
    )  # fmt: skip
    # The query heads of a kv head stand as its queries: no key is copied for them.
    queries = q.reshape(requests, kv_heads, heads // kv_heads, head_dim)  # [R, Hkv, G, D]
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=group.mask, scale=scale)
    return out.reshape(requests, heads, head_dim)


def _prefill(q: Tensor, cache: LayerCache, prefill: Prefill, tail_mask: Tensor | None, scale: float) -> Tensor:
    count, heads, head_dim = q.shape
    kv_heads = cache.num_kv_heads
    group = heads // kv_heads
    k, v = (
        read_blocks(pages, scales, prefill.blocks, q.dtype)  # [blocks * block_size, Hkv, D]
        .transpose(0, 1).unsqueeze(1).expand(kv_heads, group, -1, head_dim)  # one copy for the heads of a group
        for pages, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
    )  # fmt: skip
    queries = q.reshape(count, kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, n, D]
    if tail_mask is None or prefill.context == count:
        keys, values = k[:, :, : prefill.context], v[:, :, : prefill.context]
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        return out.permute(2, 0, 1, 3).reshape(count, heads, head_dim)
    out = torch.empty(count, kv_heads, group, head_dim, dtype=q.dtype)
    for first in range(0, count, QUERY_TILE):
        last = min(first + QUERY_TILE, count)
        seen = prefill.context - count + last  # keys up to this tile's last query
        mask = tail_mask[tail_mask.shape[0] - (last - first) :, tail_mask.shape[1] - seen :]
        tile = F.scaled_dot_product_attention(
            queries[:, :, first:last], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale
        )
        out[first:last] = tile.permute(2, 0, 1, 3)
    return out.view(count, heads, head_dim)
