"""Writing keys and values into the paged cache, as they are or as int8."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cache import LayerCache
from kernels.gpu.variant import Variant

HEADS = 8
"""Heads of a program: of 128 features in bf16, 16 bytes for each of 4 warps' threads."""
WARPS = 4
STRIDES = ("k_stride", "k_head_stride", "v_stride", "v_head_stride")
LARGEST_SCALE = tl.constexpr(65504.0)
"""The largest fp16."""
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and taking it away again leaves an fp32 below 2^22 rounded to an integer, ties to even."""


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Row t goes to slot ``slot_mapping[t]``; D contiguous; see `ops.store_kv`."""
    tokens, kv_heads, head_dim = k.shape
    heads = min(HEADS, triton.next_power_of_2(kv_heads))
    store[(tokens, 2 * triton.cdiv(kv_heads, heads))](
        k, v, cache.keys, cache.values, cache.key_scales, cache.value_scales, slot_mapping,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, PADDED=triton.next_power_of_2(head_dim), HEADS=heads,
        BLOCK_SIZE=cache.block_size, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def store(
    k, v, keys, values, key_scales, value_scales, slots,
    k_stride, k_head_stride, v_stride, v_head_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Grid (T, 2 Hkv / HEADS): first the keys, then the values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    parts: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    part = tl.program_id(1)
    heads = (part % parts) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, PADDED)
    here = (heads[:, None] < KV_HEADS) & (columns[None, :] < HEAD_DIM)
    if part < parts:
        rows = tl.load(k + token * k_stride + heads[:, None] * k_head_stride + columns[None, :], mask=here, other=0.0)
        write(rows, keys, key_scales, slot, heads, columns, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    else:
        rows = tl.load(v + token * v_stride + heads[:, None] * v_head_stride + columns[None, :], mask=here, other=0.0)
        write(rows, values, value_scales, slot, heads, columns, KV_HEADS, HEAD_DIM, BLOCK_SIZE)


@triton.jit
def write(
    rows, pages, scales, slot, heads, columns,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Write `rows` [heads, columns], zero beyond D, to a slot of `pages` [blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM].

    With scales, fp16 [blocks, KV_HEADS, BLOCK_SIZE], quantized exactly as `kernels.reference.cache.quantize`.
    """
    here = (heads[:, None] < KV_HEADS) & (columns[None, :] < HEAD_DIM)
    target = pages + (slot * KV_HEADS + heads[:, None]) * HEAD_DIM + columns[None, :]
    if scales is None:
        tl.store(target, rows, mask=here)
    else:
        wide = rows.to(tl.float32)
        peak = tl.max(tl.abs(wide), 1)
        scale = tl.minimum(tl.div_rn(peak, tl.full(peak.shape, 127.0, tl.float32)), LARGEST_SCALE).to(tl.float16)
        divisor = scale.to(tl.float32)
        divisor = tl.where(divisor > 0.0, divisor, 1.0)
        quotient = tl.div_rn(wide, tl.broadcast_to(divisor[:, None], wide.shape))
        nearest = (quotient + ROUNDING) - ROUNDING
        tl.store(target, tl.minimum(tl.maximum(nearest, -127.0), 127.0).to(tl.int8), mask=here)
        place = (slot // BLOCK_SIZE * KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
        tl.store(scales + place, scale, mask=heads < KV_HEADS)


def variants() -> list[Variant]:
    """Bf16 keys and values of 8 heads of 128 into a bf16 and an int8 cache."""
    return [
        Variant(
            f"store_kv {page}",
            store,
            signature={
                "k": "*bf16", "v": "*bf16", "keys": f"*{page}", "values": f"*{page}",
                **({"key_scales": "*fp16", "value_scales": "*fp16"} if scales else {}), "slots": "*i64",
                **dict.fromkeys(STRIDES, "i32"),
            },
            constexprs={
                **({} if scales else {"key_scales": None, "value_scales": None}),
                "KV_HEADS": 8, "HEAD_DIM": 128, "PADDED": 128, "HEADS": HEADS, "BLOCK_SIZE": 16,
            },
            num_warps=WARPS,
            num_stages=1,
            aligned=("k", "v", "keys", "values", "key_scales", "value_scales", "slots", *STRIDES),
        )
        for page, scales in (("bf16", False), ("i8", True))
    ]  # fmt: skip
