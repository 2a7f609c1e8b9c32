"""Rotary position embedding, alone and with the write into the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache import LayerCache
from kernels.gpu.cache import HEADS, WARPS, write
from kernels.gpu.variant import Variant


def rotary_table(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Fp32 [T, 2, D/2]: the cosines of a token side by side, then its sines."""
    half = len(inv_freq)
    out = torch.empty((len(positions), 2, half), dtype=torch.float32, device=positions.device)
    angles[(len(positions),)](
        positions, inv_freq, out, HALF=half, PADDED=triton.next_power_of_2(half), num_warps=1, enable_fp_fusion=True
    )
    return out


def rotary(x: Tensor, table: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate [T, heads, D]; D contiguous; see `ops.rotary`."""
    tokens, num_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turn[(tokens, triton.cdiv(num_heads, HEADS))](
        x, table, out, x.stride(0), x.stride(1),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, PADDED=triton.next_power_of_2(head_dim), HEADS=HEADS,
        INTERLEAVED=interleaved, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def rotary_store_kv(
    qkv: Tensor, table: Tensor, cache: LayerCache, slot_mapping: Tensor, *, num_heads: int, interleaved: bool
) -> Tensor:
    """One pass over the projection's output; see `ops.rotary_store_kv`."""
    tokens, _, head_dim = qkv.shape
    kv_heads = cache.num_kv_heads
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    parts = triton.cdiv(num_heads, HEADS) + 2 * triton.cdiv(kv_heads, HEADS)
    turn_and_store[(tokens, parts)](
        qkv, table, q, cache.keys, cache.values, cache.key_scales, cache.value_scales, slot_mapping,
        qkv.stride(0), qkv.stride(1),
        NUM_HEADS=num_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PADDED=triton.next_power_of_2(head_dim),
        HEADS=HEADS, BLOCK_SIZE=cache.block_size, INTERLEAVED=interleaved, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return q


@triton.jit
def angles(positions, inv_freq, out, HALF: tl.constexpr, PADDED: tl.constexpr):
    """Grid (T,). The cosine is libdevice's, right for any fp32: angles go up to the number of positions."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + at, mask=at < HALF, other=0.0)
    tl.store(out + token * 2 * HALF + at, tl.cos(angle), mask=at < HALF)
    tl.store(out + token * 2 * HALF + HALF + at, tl.sin(angle), mask=at < HALF)


@triton.jit
def turn(
    x, table, out, stride, head_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid (T, heads / HEADS)."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, PADDED)
    here = (heads[:, None] < NUM_HEADS) & (columns[None, :] < HEAD_DIM)
    rows = turned(
        x + token * stride, table + token * HEAD_DIM, heads, columns, here, head_stride, HEAD_DIM, INTERLEAVED
    )
    tl.store(out + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM + columns[None, :], rows, mask=here)


@triton.jit
def turn_and_store(
    qkv, table, q, keys, values, key_scales, value_scales, slots, stride, head_stride,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid (T, query heads / HEADS + 2 Hkv / HEADS): each turns queries, or turns and stores keys, or stores values.

    Each byte of the projection is read once, and written once in the place and type attention reads it from. Keys are
    rounded to the compute dtype before they are quantized, so that the result is that of `rotary`, then `store_kv`.
    """
    q_parts: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    kv_parts: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = tl.arange(0, PADDED)
    source = qkv + token * stride
    table += token * HEAD_DIM
    if part < q_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        here = (heads[:, None] < NUM_HEADS) & (columns[None, :] < HEAD_DIM)
        rows = turned(source, table, heads, columns, here, head_stride, HEAD_DIM, INTERLEAVED)
        tl.store(q + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM + columns[None, :], rows, mask=here)
        return
    slot = tl.load(slots + token)
    heads = (part - q_parts) % kv_parts * HEADS + tl.arange(0, HEADS)
    here = (heads[:, None] < KV_HEADS) & (columns[None, :] < HEAD_DIM)
    if part < q_parts + kv_parts:
        source += NUM_HEADS * head_stride
        rows = turned(source, table, heads, columns, here, head_stride, HEAD_DIM, INTERLEAVED)
        write(rows, keys, key_scales, slot, heads, columns, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    else:
        source += (NUM_HEADS + KV_HEADS) * head_stride
        rows = tl.load(source + heads[:, None] * head_stride + columns[None, :], mask=here, other=0.0)
        write(rows, values, value_scales, slot, heads, columns, KV_HEADS, HEAD_DIM, BLOCK_SIZE)


@triton.jit
def turned(source, table, heads, columns, here, head_stride, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotated heads of a token, [heads, columns] in the dtype of `source`: ``x cos -+ partner sin`` of each feature."""
    half: tl.constexpr = HEAD_DIM // 2
    base = source + heads[:, None] * head_stride
    x = tl.load(base + columns[None, :], mask=here, other=0.0)
    if INTERLEAVED:
        pair = columns // 2
        first = columns % 2 == 0
        # Partners stand side by side, so they are in the registers of one thread.
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        partner = tl.reshape(tl.join(b, a), x.shape)
    else:
        pair = columns % half
        first = columns < half
        other = tl.where(first, columns + half, columns - half)
        partner = tl.load(base + other[None, :], mask=here, other=0.0)  # from the L1 cache
    cos = tl.load(table + pair, mask=columns < HEAD_DIM, other=0.0)
    sin = tl.load(table + half + pair, mask=columns < HEAD_DIM, other=0.0)
    sin = tl.where(first, -sin, sin)
    return (x.to(tl.float32) * cos[None, :] + partner.to(tl.float32) * sin[None, :]).to(x.dtype)


def variants() -> list[Variant]:
    """ERNIE-4.5-300B-A47B on one GPU, with a bf16 and an int8 cache; and the other order of features."""
    table = {"positions": "*i32", "inv_freq": "*fp32", "out": "*fp32"}
    sizes = {"HALF": 64, "PADDED": 64}
    return [
        Variant("rotary_table", angles, table, sizes, num_warps=1, num_stages=1, aligned=tuple(table)),
        *(
            _variant(page, interleaved=interleaved)
            for page, interleaved in (("bf16", True), ("i8", True), ("i8", False))
        ),
    ]


def _variant(page: str, *, interleaved: bool) -> Variant:
    scales = ("key_scales", "value_scales")
    quantized = page == "i8"
    pointers = {
        "qkv": "*bf16", "table": "*fp32", "q": "*bf16", "keys": f"*{page}", "values": f"*{page}",
        **(dict.fromkeys(scales, "*fp16") if quantized else {}), "slots": "*i64",
    }  # fmt: skip
    strides = {"stride": "i32", "head_stride": "i32"}
    return Variant(
        f"rotary_store_kv {page}{'' if interleaved else ' half-split'}",
        turn_and_store,
        signature={**pointers, **strides},
        constexprs={
            **({} if quantized else dict.fromkeys(scales)),
            "NUM_HEADS": 64, "KV_HEADS": 8, "HEAD_DIM": 128, "PADDED": 128, "HEADS": HEADS, "BLOCK_SIZE": 16,
            "INTERLEAVED": interleaved,
        },
        num_warps=WARPS,
        num_stages=1,
        aligned=(*pointers, *strides),
    )  # fmt: skip
