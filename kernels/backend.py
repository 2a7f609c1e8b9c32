"""What the kernels of a device provide: modules such as `kernels.reference` and `kernels.cpu` have this shape."""
# ruff: noqa: D102  # kernels.ops, which calls these, documents them

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.operands import Weight
from kernels.prepared import Prepared


class Kernels(Protocol):
    """One function for each operation of `kernels.ops`, under the same name."""

    def prepare(self, weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Prepared: ...

    def linear(self, x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor: ...

    def prepare_embedding(self, weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Tensor | Prepared: ...

    def embedding(self, ids: Tensor, table: Tensor | Prepared, first_row: int) -> Tensor: ...

    def route(
        self, x: Tensor, gate: Tensor, bias: Tensor | None, *, top_k: int, norm_min: float
    ) -> tuple[Tensor, Tensor]: ...

    def fused_moe(self, x: Tensor, gate_up: Prepared, down: Prepared, weights: Tensor, ids: Tensor) -> Tensor: ...

    def silu_and_mul(self, x: Tensor) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def rotary_table(self, positions: Tensor, inv_freq: Tensor) -> Tensor: ...

    def rotary(self, x: Tensor, table: Tensor, *, interleaved: bool) -> Tensor: ...

    def store_kv(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None: ...

    def rotary_store_kv(
        self, qkv: Tensor, table: Tensor, cache: LayerCache, slot_mapping: Tensor, *, num_heads: int, interleaved: bool
    ) -> Tensor: ...

    def attention_metadata(
        self,
        block_tables: np.ndarray,
        query_start: np.ndarray,
        context_lens: np.ndarray,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> AttentionMetadata: ...

    def decode_metadata(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, *, block_size: int, dtype: torch.dtype
    ) -> AttentionMetadata: ...

    def paged_attention(self, q: Tensor, cache: LayerCache, metadata: AttentionMetadata, *, scale: float) -> Tensor: ...
