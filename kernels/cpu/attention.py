"""Paged attention on a CPU: compiled straight from the pages, or torch's fused attention over gathered ones.

Requests with one query (decoding) are compiled where the compute dtype is fp32. In another they go together, padded to
the longest of their group; a group's contexts differ by less than a factor of two in blocks, so padding never doubles
the work. Requests with several queries (prefill) go one by one: their work is in the products of each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache import LayerCache
from kernels.cpu.layout import POSITIONS, SCORES
from kernels.cpu.threads import Stage, fp32, run
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


class Decodes:
    """Requests with one query each, for the compiled kernel.

    Args:
        tables: int32 [R, max_blocks], its rows contiguous.
        contexts: int32 [R].
        rows: int32 [R], of the flat batch.
        longest: positions that a context may have.
        positions: likewise, of all of them together.
    """

    def __init__(self, tables: Tensor, contexts: Tensor, rows: Tensor, *, longest: int, positions: int) -> None:
        self.tables, self.contexts, self.rows = tables, contexts, rows
        self.positions = positions
        requests = len(contexts)
        self.max_spans = min(requests * -(-longest // POSITIONS), requests + positions // POSITIONS)
        self.count = torch.empty(1, dtype=torch.int64)
        self.spans = torch.empty(self.max_spans, 4, dtype=torch.int32)
        arguments = (requests, contexts.data_ptr(), self.count.data_ptr(), self.spans.data_ptr())
        run(Stage("divide", arguments, tasks=1, num_bytes=0, keep=self))
        self._states = self._finished = torch.empty(0)

    def room(self, kv_heads: int, state: int) -> tuple[Tensor, Tensor]:
        """Fp32 [spans, kv heads, state] for use, and int64 zeros [R, kv heads]: the same for all layers of a step."""
        if self._states.numel() < self.max_spans * kv_heads * state:
            self._states = torch.empty(self.max_spans * kv_heads * state)
            self._finished = torch.zeros(len(self.contexts), kv_heads, dtype=torch.int64)
        return self._states, self._finished


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

    decodes: Decodes | None
    """Requests with one query each, if the compute dtype is fp32 and there are any."""
    groups: tuple[DecodeGroup, ...]
    """The same requests in another dtype."""
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
    single = np.flatnonzero(counts == 1)
    num_blocks = -(-context_lens // block_size)
    decodes: Decodes | None = None
    groups: tuple[DecodeGroup, ...] = ()
    if len(single) and dtype == torch.float32:
        contexts = context_lens[single].astype(np.int32)
        decodes = Decodes(
            torch.from_numpy(np.ascontiguousarray(block_tables[single], dtype=np.int32)),
            torch.from_numpy(contexts),
            torch.from_numpy(query_start[single].astype(np.int32)),
            longest=int(contexts.max()),
            positions=int(contexts.sum()),
        )
    elif len(single):
        groups = _groups(single, block_tables, query_start, context_lens, num_blocks, dtype)
    prefills = []
    longest = 0
    for r in np.flatnonzero(counts != 1).tolist():
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
        groups=groups,
        prefills=tuple(prefills),
        tail_mask=_tail_mask(longest, dtype) if longest else None,
    )


def decode_metadata(
    block_tables: Tensor, query_start: Tensor, context_lens: Tensor, *, block_size: int, dtype: torch.dtype
) -> CpuAttentionMetadata:
    """With fp32, what is done depends on no value; see `ops.decode_metadata`."""
    if dtype != torch.float32:
        arrays = (tensor.numpy() for tensor in (block_tables, query_start, context_lens))
        return attention_metadata(*arrays, block_size=block_size, dtype=dtype, device=block_tables.device)
    requests, longest = len(context_lens), block_tables.shape[1] * block_size
    rows = query_start[:requests].contiguous()
    return CpuAttentionMetadata(
        block_tables=block_tables,
        query_start=query_start,
        context_lens=context_lens,
        block_size=block_size,
        decodes=Decodes(block_tables, context_lens, rows, longest=longest, positions=requests * longest),
        groups=(),
        prefills=(),
        tail_mask=None,
    )


def _groups(
    members: np.ndarray,
    block_tables: np.ndarray,
    query_start: np.ndarray,
    context_lens: np.ndarray,
    num_blocks: np.ndarray,
    dtype: torch.dtype,
) -> tuple[DecodeGroup, ...]:
    groups: dict[int, list[int]] = defaultdict(list)
    for r in members.tolist():
        groups[int(num_blocks[r]).bit_length()].append(r)
    return tuple(
        _decode_group(np.asarray(rows), block_tables, query_start, context_lens, num_blocks, dtype)
        for _, rows in sorted(groups.items())
    )


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
    if len(metadata.groups) == 1 and metadata.groups[0].rows is None:
        return _decode(q, cache, metadata.groups[0], scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    if metadata.decodes is not None:
        _attend(q, cache, metadata.decodes, scale, out)
    for group in metadata.groups:
        if group.rows is not None:
            queries = q.index_select(0, group.rows)
            out.index_copy_(0, group.rows, _decode(queries, cache, group, scale))
    for prefill in metadata.prefills:
        queries = q[prefill.start : prefill.end]
        out[prefill.start : prefill.end] = _prefill(queries, cache, prefill, metadata.tail_mask, scale)
    return out


def _attend(q: Tensor, cache: LayerCache, decodes: Decodes, scale: float, out: Tensor) -> None:
    """Write the rows of the requests with one query to `out` [T, Hq, D], contiguous.

    Raises:
        TypeError: the metadata was made for fp32, and `q` or the cache is in another dtype.
    """
    if q.dtype != torch.float32 or (cache.keys.dtype != torch.float32 and not cache.quantized):
        raise TypeError(f"the metadata was made for fp32, not queries of {q.dtype} and keys of {cache.keys.dtype}")
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    kv_heads, head_dim = cache.num_kv_heads, q.shape[2]
    group = q.shape[1] // kv_heads
    states, finished = decodes.room(kv_heads, group * (2 + head_dim + SCORES))
    scales = (0 if scale is None else scale.data_ptr() for scale in (cache.key_scales, cache.value_scales))
    arguments = (
        *(decodes.count.data_ptr(), kv_heads, group, head_dim, cache.block_size),
        *(decodes.spans.data_ptr(), decodes.tables.data_ptr(), decodes.tables.stride(0)),
        *(decodes.contexts.data_ptr(), decodes.rows.data_ptr()),
        *(q.data_ptr(), 4 * q.stride(0), cache.keys.data_ptr(), cache.values.data_ptr(), fp32(scale)),
        *(states.data_ptr(), finished.data_ptr(), out.data_ptr(), *scales),
    )
    read = 2 * kv_heads * head_dim * cache.keys.element_size() * decodes.positions
    run(
        Stage("attend", arguments, tasks=decodes.max_spans * kv_heads, num_bytes=read, keep=(decodes, states, finished))
    )


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
