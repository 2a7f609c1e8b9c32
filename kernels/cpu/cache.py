"""Writing keys and values into a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference
from kernels.cache import LayerCache
from kernels.cpu.threads import Arguments, Stage, run
from kernels.reference.rotary import rotary


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Row t goes to slot ``slot_mapping[t]``."""
    if cache.quantized:
        reference.store_kv(k, v, cache, slot_mapping)
        return
    cache.keys.flatten(0, 1).index_copy_(0, slot_mapping, k)
    cache.values.flatten(0, 1).index_copy_(0, slot_mapping, v)


def rotary_store_kv(
    qkv: Tensor, table: Tensor, cache: LayerCache, slot_mapping: Tensor, *, num_heads: int, interleaved: bool
) -> Tensor:
    """`rotary` of queries and keys together, then `store_kv`, fp32 in one pass; see `ops.rotary_store_kv`."""
    kv_heads = cache.num_kv_heads
    tokens, heads, head_dim = qkv.shape
    stored = torch.int8 if cache.quantized else torch.float32
    fits = qkv.dtype == torch.float32 and cache.keys.dtype == stored and slot_mapping.dtype == torch.int64
    if fits and heads == num_heads + 2 * kv_heads and qkv.stride()[1:] == (head_dim, 1):
        out = torch.empty(tokens, num_heads + kv_heads if cache.quantized else num_heads, head_dim)
        angles = table.contiguous()
        slots, num_slots = slot_mapping.contiguous(), cache.keys.shape[0] * cache.block_size
        scales = (0 if scales is None else scales.data_ptr() for scales in (cache.key_scales, cache.value_scales))
        arguments = (
            *(tokens, num_heads, kv_heads, head_dim, qkv.data_ptr(), 4 * qkv.stride(0)),
            *(angles.data_ptr(), interleaved, slots.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr()),
            *(out.data_ptr(), num_slots, 0, *scales, cache.block_size),
        )
        run(Stage("rotate", arguments, tasks=tokens, num_bytes=8 * qkv.numel(), check=_check_slots))
        return out[:, :num_heads]
    turned = num_heads + kv_heads
    qk = rotary(qkv[:, :turned], table, interleaved=interleaved)
    store_kv(qk[:, num_heads:], qkv[:, turned:], cache, slot_mapping)
    return qk[:, :num_heads]


def _check_slots(arguments: Arguments) -> None:
    """Of the kernel `elementwise.rotate`."""
    lost, arguments[14] = arguments[14], 0
    if lost:
        raise IndexError(f"{lost} of {arguments[1]} tokens go to a slot beyond the {arguments[13]} of the cache")
