"""vLLM's build of FlashAttention, where it is installed: the same pages, the same answers.

Not a dependency: `kernels.gpu.attention` runs its own kernels where this isn't there, or can't do what is asked.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cache import LayerCache
from kernels.metadata import AttentionMetadata

PACKAGES = ("vllm.vllm_flash_attn", "vllm_flash_attn")
PAGE = 16
"""Blocks must be multiples of so many positions."""


@functools.cache
def varlen() -> Callable[..., Tensor] | None:
    """``flash_attn_varlen_func`` of the first package that is installed."""
    for package in PACKAGES:
        try:
            function: Callable[..., Tensor] = importlib.import_module(package).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        return function
    return None


def usable(*, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether batches of this kind can go to FlashAttention."""
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and block_size % PAGE == 0 and varlen() is not None


def attention(
    q: Tensor, cache: LayerCache, metadata: AttentionMetadata, *, max_queries: int, max_context: int, scale: float
) -> Tensor:
    """As `ops.paged_attention`, over a cache in the compute dtype.

    Args:
        q: [T, heads, D].
        cache: not quantized.
        metadata: where queries and keys stand.
        max_queries: at least the most queries of a request.
        max_context: at least the longest context.
        scale: of the scores.

    Raises:
        RuntimeError: no package has it; see `usable`.
    """
    function = varlen()
    if function is None:
        raise RuntimeError(f"none of {', '.join(PACKAGES)} is installed")
    return function(
        q=q,
        k=cache.keys,
        v=cache.values,
        max_seqlen_q=max_queries,
        cu_seqlens_q=metadata.query_start,
        max_seqlen_k=max_context,
        seqused_k=metadata.context_lens,
        softmax_scale=scale,
        causal=True,
        block_table=metadata.block_tables,
    )
