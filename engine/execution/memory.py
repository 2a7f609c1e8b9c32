"""Where the memory of a GPU goes, and what to change when it does not suffice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.config import EngineConfig

MAX_UTILIZATION = 0.97
"""The CUDA context and fragments of torch's allocator need the rest."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of one rank's GPU, measured before the KV cache is made.

    Attributes:
        total: all there is.
        weights: the rank's share of the model.
        other: other processes, and what CUDA itself takes.
        activations: what the largest step takes on top, at its peak.
        graphs: what the CUDA graphs of decode steps take, their buffers included.
    """

    total: int
    weights: int
    other: int
    activations: int
    graphs: int

    @property
    def fixed(self) -> int:
        """What is gone before the cache gets any."""
        return self.weights + self.other + self.activations + self.graphs

    def left(self, utilization: float) -> int:
        """What remains for the KV cache of the share that the engine may take; negative if less than nothing."""
        return int(self.total * utilization) - self.fixed


@dataclass(frozen=True, slots=True)
class CacheNeed:
    """What the KV cache of one rank must hold at least.

    Attributes:
        max_model_len: tokens of the longest sequence.
        block_bytes: of one block, as configured.
        int8_block_bytes: of one block with ``kv_cache_dtype`` int8.
    """

    max_model_len: int
    block_bytes: int
    int8_block_bytes: int

    def blocks(self, block_size: int) -> int:
        """Blocks of one sequence of the greatest length."""
        return -(-self.max_model_len // block_size)


def shortage(
    memory: GpuMemory,
    need: CacheNeed,
    config: EngineConfig,
    *,
    rank: int,
    num_heads: int,
    embedding_savings: Mapping[str, int] = MappingProxyType({}),
) -> str | None:
    """Why the KV cache can't hold the longest sequence, and which single changes would make room; None if it can.

    Args:
        memory: of the rank's GPU.
        need: of the cache.
        config: how the engine runs.
        rank: whose GPU.
        num_heads: query heads of the model; a tensor-parallel size has to divide them.
        embedding_savings: bytes that each value of ``quantize_embeddings`` would save, the least first.

    Returns:
        A message with the bytes by part.
    """
    needed = need.blocks(config.block_size) * need.block_bytes
    left = memory.left(config.gpu_memory_utilization)
    if needed <= left:
        return None
    missing = needed - left
    remedies = _remedies(memory, need, config, missing=missing, num_heads=num_heads)
    saving = next((how for how, saved in embedding_savings.items() if saved >= missing), None)
    if saving is not None:
        remedies.append(f"quantize_embeddings {saving}")
    advice = "; ".join(remedies) or "nothing short of a GPU with more memory, or a model of fewer bits a weight"
    share = f"{_gb(int(memory.total * config.gpu_memory_utilization))} (gpu_memory_utilization "
    return (
        f"GPU memory of rank {rank}: one sequence of max_model_len {need.max_model_len} needs {_gb(needed)} of KV "
        f"cache, and {_gb(max(0, left))} are left of {share}{config.gpu_memory_utilization} of {_gb(memory.total)}) "
        f"after {describe(memory)}. Any of these would do: {advice}"
    )


def describe(memory: GpuMemory) -> str:
    """Bytes by part, in words."""
    return (
        f"weights {_gb(memory.weights)}, activations {_gb(memory.activations)}, CUDA graphs {_gb(memory.graphs)}, "
        f"CUDA and other processes {_gb(memory.other)}"
    )


def _remedies(memory: GpuMemory, need: CacheNeed, config: EngineConfig, *, missing: int, num_heads: int) -> list[str]:
    """Options, each of which alone makes room for `missing` bytes more."""
    left = memory.left(config.gpu_memory_utilization)
    remedies = []
    if tokens := max(0, left) // need.block_bytes * config.block_size:
        remedies.append(f"max_model_len {tokens} or less")
    blocks = need.blocks(config.block_size)
    if config.kv_cache_dtype != "int8" and blocks * need.int8_block_bytes <= left:
        remedies.append("kv_cache_dtype int8")
    utilization = math.ceil(100 * (memory.fixed + blocks * need.block_bytes) / memory.total) / 100
    if config.gpu_memory_utilization < utilization <= MAX_UTILIZATION:
        remedies.append(f"gpu_memory_utilization {utilization:.2f}")
    if not config.enforce_eager and memory.graphs >= missing:
        remedies.append("enforce_eager true (decoding is slower without CUDA graphs)")
    if memory.activations > missing:
        # Activations grow with the tokens of a step, and logits with its sequences.
        share = 1 - missing / memory.activations
        tokens, seqs = int(config.max_num_batched_tokens * share), int(config.max_num_seqs * share)
        if tokens and seqs:
            remedies.append(f"about max_num_batched_tokens {tokens} with max_num_seqs {seqs}")
    if (size := _parallel_size(memory, need, config, num_heads)) is not None:
        remedies.append(f"tensor_parallel_size {size}")
    return remedies


def _parallel_size(memory: GpuMemory, need: CacheNeed, config: EngineConfig, heads: int) -> int | None:
    """The next doubling of the ranks with room for the cache, if weights and cache divide evenly."""
    cache = need.blocks(config.block_size) * need.block_bytes
    for factor in (2, 4, 8):
        size = config.tensor_parallel_size * factor
        fixed = memory.fixed - memory.weights + memory.weights // factor
        fits = cache // factor <= int(memory.total * config.gpu_memory_utilization) - fixed
        if heads % size == 0 and fits:
            return size
    return None


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
