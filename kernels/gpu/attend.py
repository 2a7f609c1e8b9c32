"""Causal attention over a paged cache, as two Triton kernels.

A program owns a tile of M rows and one kv head. The rows are queries of one request, and for each of them the query
heads of that kv head: a group of G heads reads its keys and values once. Scores and weighted sums are tensor-core
products with M rows (16 is their least), and the softmax is computed on the way (arXiv 2205.14135).

* Prefill: M = 64 or 128 in half precision, all keys up to the tile's last query in one program.
* Decode ("short" requests, whose queries times G fit one tile of 16): the keys are divided among programs
  (flash decoding), since R x Hkv programs alone would leave most multiprocessors idle; `combine` adds the parts in
  their order, so that the result is the same every time.

Bytes: with M = 16, each number of a bf16 key or value takes part in 16 multiply-adds, 16 flops a byte: an A100's tensor
cores do 150 in the time a byte takes, so that padding G to 16 rows costs no time. Int8 halves the bytes: a key's scale
multiplies its scores and a value's scale its weights, M x N products for a tile of N keys in place of N x D, and the
conversion of the integers to the compute dtype is exact.

A head of D features is computed as one of PADDED, the next power of two, of which nothing but zeros is added to it:
only D are read and written.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""A score that no key has; finite, so that differences of two of them are numbers."""
TINY = tl.constexpr(1e-30)


@triton.jit(do_not_specialize=["table_stride", "requests", "splits"])
def attend(
    q, out, parts, sizes, keys, values, key_scales, value_scales, block_tables, query_start, context_lens,
    q_stride, q_head_stride, table_stride, requests, splits, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SHORT: tl.constexpr, DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of queries against all keys it may see, or against a part of them.

    Grid (R, Hkv, splits) to decode, else (T // QUERIES + R, Hkv): no fewer tiles than any batch of T tokens can have.

    Args:
        q: [T, heads, D].
        out: [T, heads, D], written unless SPLIT.
        parts: fp32 [R, Hkv, splits, M, D] if SPLIT, the weighted means of a part of the keys.
        sizes: fp32 [R, Hkv, splits, M] if SPLIT, log2 of the sums of weights.
        scale: of the scores, times log2(e): weights are powers of two.
        SHORT: a request of up to so many queries is left to decoding, a longer one to prefill.
    """
    QUERIES: tl.constexpr = M // GROUP
    head = tl.program_id(1)
    if DECODE:
        request = tl.program_id(0)
        first = 0
    else:
        # Late tiles see the most keys, so they start first.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        request = owner(tile, query_start, requests, QUERIES)
        first = (tile - tl.load(query_start + request) // QUERIES - request) * QUERIES
    start = tl.load(query_start + request)
    count = tl.load(query_start + request + 1) - start
    if DECODE:
        if count > SHORT:
            return
    else:
        if first >= count or count <= SHORT:
            return
    context = tl.load(context_lens + request)
    past = context - count + first  # keys that every query of the tile sees, less its own
    end = tl.minimum(context, past + QUERIES)
    begin = 0
    if SPLIT:
        length = keys_of_a_split(end, splits, N)
        begin = tl.program_id(2) * length
        end = tl.minimum(begin + length, end)
        if begin >= end:
            return

    rows = tl.arange(0, M)
    query = first + rows // GROUP
    valid = (rows < QUERIES * GROUP) & (query < count)
    heads = head * GROUP + rows % GROUP
    columns = tl.arange(0, PADDED)
    stored = valid[:, None] if PADDED == HEAD_DIM else valid[:, None] & (columns < HEAD_DIM)[None, :]
    q_rows = (start + query).to(tl.int64) * q_stride + heads * q_head_stride
    queries = tl.load(q + q_rows[:, None] + columns[None, :], mask=stored, other=0.0)  # [M, D]
    positions = context - count + query
    table = block_tables + request.to(tl.int64) * table_stride

    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], LOWEST, tl.float32)
    mean = tl.zeros([M, PADDED], tl.float32)
    plain = begin + tl.maximum(tl.minimum(end, past + 1) - begin, 0) // N * N
    for offset in range(begin, plain, N):
        mean, total, peak = extend(
            mean, total, peak, queries, positions, offset, end, table, keys, values, key_scales, value_scales, head,
            scale, KV_HEADS, HEAD_DIM, PADDED, BLOCK_SIZE, N, False,
        )  # fmt: skip
    for offset in tl.range(plain, end, N, num_stages=1):
        mean, total, peak = extend(
            mean, total, peak, queries, positions, offset, end, table, keys, values, key_scales, value_scales, head,
            scale, KV_HEADS, HEAD_DIM, PADDED, BLOCK_SIZE, N, True,
        )  # fmt: skip
    mean = mean / tl.maximum(total, TINY)[:, None]
    if SPLIT:
        part = ((request * KV_HEADS + head) * splits + tl.program_id(2)).to(tl.int64) * M + rows
        tl.store(parts + part[:, None] * HEAD_DIM + columns[None, :], mean, mask=stored)
        tl.store(sizes + part, peak + tl.log2(tl.maximum(total, TINY)), mask=valid)
    else:
        out_rows = ((start + query).to(tl.int64) * (KV_HEADS * GROUP) + heads) * HEAD_DIM
        tl.store(out + out_rows[:, None] + columns[None, :], mean, mask=stored)


@triton.jit
def extend(
    mean, total, peak, queries, positions, offset, end, table, keys, values, key_scales, value_scales, head, scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take in the keys at positions ``offset ... offset + N - 1``; MASKED where some of them are not to be seen by all.

    Pages are gathered key by key: the D features of a key in one head stand side by side, 256 bytes in bf16. A product
    of fp32 is three of tensor-core precision (tf32x3), nearly as exact as fp32 itself.
    """
    at = offset + tl.arange(0, N)
    columns = tl.arange(0, PADDED)
    if MASKED:
        here = at < end
        block = tl.load(table + at // BLOCK_SIZE, mask=here, other=0).to(tl.int64)
    else:
        block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
    row = ((block * BLOCK_SIZE + at % BLOCK_SIZE) * KV_HEADS + head) * HEAD_DIM
    where = row[:, None] + columns[None, :]
    if PADDED != HEAD_DIM:
        stored = tl.broadcast_to((columns < HEAD_DIM)[None, :], (N, PADDED))
        if MASKED:
            stored = stored & here[:, None]
        k = tl.load(keys + where, mask=stored, other=0)  # [N, D]
        v = tl.load(values + where, mask=stored, other=0)
    elif MASKED:
        k = tl.load(keys + where, mask=here[:, None], other=0)
        v = tl.load(values + where, mask=here[:, None], other=0)
    else:
        k = tl.load(keys + where)
        v = tl.load(values + where)
    scores = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision="tf32x3") * scale  # [M, N]
    if key_scales is not None:
        place = (block * KV_HEADS + head) * BLOCK_SIZE + at % BLOCK_SIZE
        if MASKED:
            k_scale = tl.load(key_scales + place, mask=here, other=0.0)
            v_scale = tl.load(value_scales + place, mask=here, other=0.0)
        else:
            k_scale = tl.load(key_scales + place)
            v_scale = tl.load(value_scales + place)
        scores *= k_scale.to(tl.float32)[None, :]
    if MASKED:
        seen = here[None, :] & (at[None, :] <= positions[:, None])
        scores = tl.where(seen, scores, LOWEST)
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(weights, 1)
    if value_scales is not None:
        weights *= v_scale.to(tl.float32)[None, :]
    mean = tl.dot(weights.to(queries.dtype), v.to(queries.dtype), mean * fade[:, None], input_precision="tf32x3")
    return mean, total, higher


@triton.jit(do_not_specialize=["splits"])
def combine(
    parts, sizes, out, query_start, context_lens, splits,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, SHORT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean of the parts of `attend`, weighted by their sizes: one row [D] of the output from all of its parts at once.

    Grid (R, queries x G, Hkv). SPLITS is a power of two, at least ``splits``.
    """
    request, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start + request)
    count = tl.load(query_start + request + 1) - start
    if count > SHORT or row // GROUP >= count:
        return
    end = tl.load(context_lens + request)
    end = tl.minimum(end, end - count + M // GROUP)
    used = tl.cdiv(end, keys_of_a_split(end, splits, N))
    split = tl.arange(0, SPLITS)
    columns = tl.arange(0, PADDED)
    stored = columns < HEAD_DIM
    part = ((request * KV_HEADS + head) * splits + split).to(tl.int64) * M + row
    size = tl.load(sizes + part, mask=split < used, other=LOWEST)
    weight = tl.where(split < used, tl.exp2(size - tl.max(size, 0)), 0.0)
    there = (split < used)[:, None] & stored[None, :]
    mean = tl.load(parts + part[:, None] * HEAD_DIM + columns[None, :], mask=there, other=0.0)
    mean = tl.sum(mean * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), TINY)
    target = ((start + row // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP) * HEAD_DIM
    tl.store(out + target + columns, mean, mask=stored)


@triton.jit
def keys_of_a_split(end, splits, N: tl.constexpr):
    """Keys of each part of ``0 ... end - 1``, a multiple of N; the last parts may have fewer or none."""
    return tl.maximum(tl.cdiv(tl.cdiv(end, N), splits), 1) * N


@triton.jit
def owner(tile, query_start, requests, QUERIES: tl.constexpr):
    """The request of a tile, where request r's tiles start at ``query_start[r] // QUERIES + r``.

    That leaves room for all of them, one or two more than needed, and asks nothing of the host.
    """
    low = 0
    high = requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low
