"""The integer format of AutoGPTQ and its heirs: 2, 4 or 8 bits, a scale and a zero point for each group of rows.

``w = (q - zero) * scale``. The zero point is stored as it is used (what GPTQModel calls ``gptq_v2``); AutoGPTQ's
first format stored it less one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.errors import UnsupportedError
from engine.quantization.format import Span, TensorSpec, WeightFormat
from engine.quantization.grouping import check_group_size, check_integer, check_rows
from kernels.operands import GroupedWeight
from kernels.reference.dequantize import unpack_words

BITS = (2, 4, 8)
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Gptq(WeightFormat):
    """``qweight`` int32 [K*bits/32, N], ``qzeros`` int32 [K/G, N*bits/32], ``scales`` fp16 [K/G, N].

    A word of ``qweight`` holds neighbouring rows of a column, one of ``qzeros`` neighbouring columns; the first is in
    the lowest bits.
    """

    name: ClassVar[str] = "gptq"

    bits: int = 2
    group_size: int = 64

    def __post_init__(self) -> None:
        check_integer(self.name, "bits", self.bits)
        check_group_size(self.name, self.group_size)
        if self.bits not in BITS:
            raise UnsupportedError(f"{self.name}: bits {self.bits} is not supported; supported: 2, 4, 8")

    @property
    def row_tile(self) -> int:
        """A group of rows has one scale."""
        return self.group_size

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """Needs K in multiples of the group size, N in whole words of zero points."""
        check_rows(self.name, k, n, group_size=self.group_size)
        per_word = _WORD_BITS // self.bits
        if n % per_word:
            raise UnsupportedError(f"{self.name} of {self.bits} bits needs N in multiples of {per_word}; found N={n}")
        return {
            "qweight": TensorSpec((k // per_word, n), ("I32",)),
            "qzeros": TensorSpec((k // self.group_size, n // per_word), ("I32",)),
            "scales": TensorSpec((k // self.group_size, n), ("F16", "BF16")),
        }

    def size(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(K, N)."""
        words, n = tensors["qweight"].shape
        return words * (_WORD_BITS // self.bits), n

    def load(self, tensors: Mapping[str, Tensor], *, rows: Span, columns: Sequence[Span]) -> GroupedWeight:
        """The part; zero points are unpacked, so that columns can be cut inside their words."""
        per_word = _WORD_BITS // self.bits
        words = tensors["qweight"][rows.start // per_word : rows.stop // per_word]
        groups = slice(rows.start // self.group_size, rows.stop // self.group_size)
        return GroupedWeight(
            codes=torch.cat([words[:, span.start : span.stop] for span in columns], dim=1),
            zeros=torch.cat([self._zeros(tensors["qzeros"][groups], span) for span in columns], dim=1),
            scales=torch.cat([tensors["scales"][groups, span.start : span.stop] for span in columns], dim=1),
            bits=self.bits,
        )

    def _zeros(self, qzeros: Tensor, columns: Span) -> Tensor:
        per_word = _WORD_BITS // self.bits
        first = columns.start // per_word
        touched = unpack_words(qzeros[:, first : -(-columns.stop // per_word)].T, self.bits).T  # [K/G, whole words]
        left = columns.start - first * per_word
        return touched[:, left : left + len(columns)].to(torch.uint8)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Integers 0 ... 2^bits - 1 [rows, N] -> int32 [rows*bits/32, N], the first row of a word in its lowest bits."""
    per_word = _WORD_BITS // bits
    place = (1 << (bits * torch.arange(per_word, dtype=torch.int64, device=values.device))).view(1, per_word, 1)
    words = (values.reshape(-1, per_word, values.shape[1]).to(torch.int64) * place).sum(dim=1)  # 0 ... 2^32 - 1
    return words.to(torch.int32)  # the upper half wraps to negative words
