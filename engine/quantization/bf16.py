"""Unquantized weights, in any floating dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from engine.quantization.format import Span, TensorSpec, WeightFormat
from kernels.operands import DenseWeight


class Bf16(WeightFormat):
    """``weight`` [K, N]; the loader hands a torch linear [out, in] over as its transposed view."""

    name: ClassVar[str] = "bf16"

    @property
    def row_tile(self) -> int:
        """Any row."""
        return 1

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """``weight`` [K, N], bf16, fp16 or fp32."""
        return {"weight": TensorSpec((k, n), ("BF16", "F16", "F32"))}

    def size(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(K, N)."""
        k, n = tensors["weight"].shape
        return k, n

    def load(self, tensors: Mapping[str, Tensor], *, rows: Span, columns: Sequence[Span]) -> DenseWeight:
        """The part as ``DenseWeight`` [N, K] in ``dtype``."""
        weight = tensors["weight"]
        part = torch.empty((sum(map(len, columns)), len(rows)), dtype=self.dtype)
        row = 0
        for span in columns:
            part[row : row + len(span)].copy_(weight[rows.start : rows.stop, span.start : span.stop].T)
            row += len(span)
        return DenseWeight(part)
