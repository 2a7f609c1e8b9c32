"""Unquantized in the file, integers in memory: bf16 checkpoints rounded while they load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.errors import UnsupportedError
from engine.quantization.bf16 import Bf16
from engine.quantization.format import Span, TensorSpec, WeightFormat
from kernels.operands import Int4Weight, Int8Weight

LARGEST = {8: 127, 4: 7}
"""Integers are -LARGEST ... LARGEST, as in Paddle's weight_only_int8 and weight_only_int4."""


@dataclass(frozen=True, slots=True)
class Rounded(WeightFormat):
    """``weight`` [K, N] in the file; to the kernels an integer matrix with one absmax scale an output feature.

    The scale is that of the whole feature, also where a rank has only some of its rows, so the weights are the same for
    every tensor-parallel size.
    """

    name: ClassVar[str] = Bf16.name

    bits: int

    @property
    def row_tile(self) -> int:
        """The 4-bit operand holds two rows in a byte."""
        return 2 if self.bits == 4 else 1

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """As unquantized weights have them; 4 bits need K to be even."""
        if k % self.row_tile:
            raise UnsupportedError(f"wint{self.bits} needs K in multiples of {self.row_tile}; found K={k}, N={n}")
        return Bf16().tensors(k, n)

    def size(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(K, N)."""
        return Bf16().size(tensors)

    def load(self, tensors: Mapping[str, Tensor], *, rows: Span, columns: Sequence[Span]) -> Int8Weight | Int4Weight:
        """The part, rounded against its scales as they are kept (bf16)."""
        k, _ = self.size(tensors)
        largest = LARGEST[self.bits]
        whole = Bf16(dtype=torch.float32).load(tensors, rows=Span(0, k), columns=columns).weight  # [N, K]
        scale = (whole.abs().amax(dim=1) / largest).bfloat16()
        divisor = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
        part = whole[:, rows.start : rows.stop]
        values = (part / divisor[:, None]).round_().clamp_(-largest, largest)
        if self.bits == 8:
            return Int8Weight(values=values.to(torch.int8), scale=scale)
        nibbles = (values + 8).to(torch.uint8)
        return Int4Weight(packed=nibbles[:, ::2] | (nibbles[:, 1::2] << 4), scale=scale)
