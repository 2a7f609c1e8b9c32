"""Writing keys and values into a cache."""

from __future__ import annotations

from torch import Tensor

from kernels import reference
from kernels.cache import LayerCache
from kernels.cpu.rotary import rotary


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
    """`rotary` of queries and keys together, then `store_kv`; see `ops.rotary_store_kv`."""
    turned = num_heads + cache.num_kv_heads
    qk = rotary(qkv[:, :turned], table, interleaved=interleaved)
    store_kv(qk[:, num_heads:], qkv[:, turned:], cache, slot_mapping)
    return qk[:, :num_heads]
