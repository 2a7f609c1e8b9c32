"""Writing keys and values into a cache, and reading blocks of it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache import SCALE_DTYPE, LayerCache
from kernels.reference.rotary import rotary


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of D values as int8 with one scale each: [..., D] -> int8 [..., D] and fp16 [...].

    The scale is ``absmax / 127`` as fp16, at most its largest number. ``|x - q scale| <= scale / 2`` where the scale is
    a normal fp16, that is for absmax from 0.008 to 8e6; below, the error is at most 127 * 2^-25 more.
    """
    wide = x.float()
    scale = (wide.abs().amax(dim=-1) / 127).clamp(max=torch.finfo(SCALE_DTYPE).max).to(SCALE_DTYPE)
    divisor = scale.float().unsqueeze(-1)
    # A row of (almost) zeros has scale 0, and any divisor gives it the values it needs.
    return (wide / divisor.where(divisor > 0, 1)).round().clamp(-127, 127).to(torch.int8), scale


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Row t goes to slot ``slot_mapping[t]``."""
    _store(k, cache.keys, cache.key_scales, slot_mapping)
    _store(v, cache.values, cache.value_scales, slot_mapping)


def _store(rows: Tensor, pages: Tensor, scales: Tensor | None, slots: Tensor) -> None:
    if scales is not None:
        rows, scale = quantize(rows)
        scales[slots // pages.shape[1], :, slots % pages.shape[1]] = scale
    pages.flatten(0, 1)[slots] = rows


def read_blocks(pages: Tensor, scales: Tensor | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Positions of some blocks, one block after the other: blocks [n] -> [n * block_size, Hkv, D] in `dtype`."""
    rows = pages.index_select(0, blocks)  # [n, block_size, Hkv, D]
    if scales is not None:
        # The product in fp32, which holds it exactly, is rounded once.
        rows = rows.float() * scales.index_select(0, blocks).transpose(1, 2).unsqueeze(-1).float()
    return rows.flatten(0, 1).to(dtype)


def rotary_store_kv(
    qkv: Tensor, table: Tensor, cache: LayerCache, slot_mapping: Tensor, *, num_heads: int, interleaved: bool
) -> Tensor:
    """`rotary` of queries and keys, then `store_kv`; returns the queries."""
    turned = num_heads + cache.num_kv_heads
    qk = rotary(qkv[:, :turned], table, interleaved=interleaved)
    store_kv(qk[:, num_heads:], qkv[:, turned:], cache, slot_mapping)
    return qk[:, :num_heads]
