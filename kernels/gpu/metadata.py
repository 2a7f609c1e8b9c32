"""What paged attention on a GPU must know about a flat batch, on the host and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.gpu import flash
from kernels.metadata import AttentionMetadata

ALIGNMENT = 4
"""Int32 in 16 bytes: Triton compiles a kernel once more for pointers that are not multiples of 16."""


@dataclass(frozen=True, slots=True)
class GpuAttentionMetadata(AttentionMetadata):
    """The arrays on the device, and what the host knows of them; only the latter decides what is launched.

    Attributes:
        min_queries: the fewest queries of a request.
        max_queries: the most.
        max_context: at least the longest context.
        flash: whether to use FlashAttention.
    """

    min_queries: int
    max_queries: int
    max_context: int
    flash: bool


def attention_metadata(
    block_tables: np.ndarray,
    query_start: np.ndarray,
    context_lens: np.ndarray,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> GpuAttentionMetadata:
    """The arrays in one copy, from pinned memory, which nobody waits for; see `ops.attention_metadata`."""
    arrays = (block_tables, query_start, context_lens)
    offsets = np.cumsum([0, *(-(-array.size // ALIGNMENT) * ALIGNMENT for array in arrays)])
    # torch keeps pinned memory from being used again before the copies from it are done.
    host = torch.empty(int(offsets[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for array, offset in zip(arrays, offsets[:-1].tolist(), strict=True):
        host.numpy()[offset : offset + array.size] = array.reshape(-1)
    arena = host.to(device, non_blocking=True)
    tables, starts, contexts = (
        arena[offset : offset + array.size].view(array.shape)
        for array, offset in zip(arrays, offsets[:-1].tolist(), strict=True)
    )
    counts = np.diff(query_start)
    return GpuAttentionMetadata(
        tables,
        starts,
        contexts,
        block_size,
        min_queries=int(counts.min()),
        max_queries=int(counts.max()),
        max_context=int(context_lens.max()),
        flash=flash.usable(block_size=block_size, dtype=dtype, device=device),
    )


def decode_metadata(
    block_tables: Tensor, query_start: Tensor, context_lens: Tensor, *, block_size: int, dtype: torch.dtype
) -> GpuAttentionMetadata:
    """One query a request, contexts as long as the tables allow, zero included; see `ops.decode_metadata`."""
    return GpuAttentionMetadata(
        block_tables,
        query_start,
        context_lens,
        block_size,
        min_queries=1,
        max_queries=1,
        max_context=block_tables.shape[1] * block_size,
        flash=flash.usable(block_size=block_size, dtype=dtype, device=block_tables.device),
    )
