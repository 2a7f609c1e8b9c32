"""Bit planes with their own coefficients: the storage of BPDQ (arXiv 2602.04163).

A weight is ``c0 + c1 b1 + ... + ck bk`` with one bit of each plane; every output feature has its own coefficients for
each group of rows. Two planes with three coefficients are four levels whose distances are free, where an integer grid
has one distance.

**Nested.** One set of four planes serves 2, 3 and 4 bits: whoever reads fewer takes the first planes and the
coefficients that were fitted to those alone. How many to read is the reader's choice, not the file's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from engine.errors import ConfigError, UnsupportedError
from engine.quantization.format import Span, TensorSpec, WeightFormat
from engine.quantization.grouping import WORD_ROWS, check_group_size, check_integer, check_rows
from kernels.operands import BitplaneWeight

PLANES = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Bitplane(WeightFormat):
    """``planes`` int32 [K/32, k, N] (bit t of word j: row 32j + t), ``coefficients`` bf16 [K/G, k+1, N], c0 last.

    Nested: k is 4, and ``coefficients_2``, ``coefficients_3``, ``coefficients_4`` are those for as many planes.
    """

    name: ClassVar[str] = "bitplane"

    planes: int = 2
    """How many are stored."""
    group_size: int = 64
    nested: bool = False
    read_planes: int | None = field(default=None, kw_only=True)
    """How many to read; None: all. A choice at run time, so it is no option of the checkpoint."""

    def __post_init__(self) -> None:
        check_integer(self.name, "planes", self.planes)
        check_group_size(self.name, self.group_size)
        if not isinstance(self.nested, bool):
            raise ConfigError(f"{self.name}: nested is {self.nested!r}; expected true or false")
        if self.planes not in PLANES:
            raise UnsupportedError(f"{self.name}: planes {self.planes} is not supported; supported: 2, 3, 4")
        if self.nested and self.planes != PLANES[-1]:
            raise UnsupportedError(f"{self.name}: nested weights store 4 planes; found planes {self.planes}")
        if self.read_planes is not None:
            readable = PLANES if self.nested else (self.planes,)
            if self.read_planes not in readable:
                raise UnsupportedError(
                    f"{self.name}: {self.read_planes} planes can't be read of "
                    f"{'nested ' if self.nested else ''}weights that store {self.planes}; "
                    f"possible: {', '.join(map(str, readable))}"
                )

    @property
    def row_tile(self) -> int:
        """A group of rows shares its coefficients."""
        return self.group_size

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """Needs K in multiples of the group size; any N."""
        check_rows(self.name, k, n, group_size=self.group_size)
        groups = k // self.group_size
        coefficients = (
            {f"coefficients_{count}": TensorSpec((groups, count + 1, n), ("BF16",)) for count in PLANES}
            if self.nested
            else {"coefficients": TensorSpec((groups, self.planes + 1, n), ("BF16",))}
        )
        return {"planes": TensorSpec((k // WORD_ROWS, self.planes, n), ("I32",)), **coefficients}

    def size(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(K, N)."""
        words, _, n = tensors["planes"].shape
        return words * WORD_ROWS, n

    def load(self, tensors: Mapping[str, Tensor], *, rows: Span, columns: Sequence[Span]) -> BitplaneWeight:
        """The part, of the planes that are read only."""
        count = self.read_planes or self.planes
        planes = tensors["planes"][rows.start // WORD_ROWS : rows.stop // WORD_ROWS, :count]
        coefficients = tensors[f"coefficients_{count}" if self.nested else "coefficients"]
        coefficients = coefficients[rows.start // self.group_size : rows.stop // self.group_size]
        return BitplaneWeight(
            planes=torch.cat([planes[..., span.start : span.stop] for span in columns], dim=-1),
            coefficients=torch.cat([coefficients[..., span.start : span.stop] for span in columns], dim=-1),
        )


def pack_planes(bits: Tensor) -> Tensor:
    """Bits (0 or 1, any dtype) [K, k, N] -> int32 [K/32, k, N]; bit t of word j is row 32j + t."""
    k, count, n = bits.shape
    place = (1 << torch.arange(WORD_ROWS, dtype=torch.int64, device=bits.device)).view(1, WORD_ROWS, 1, 1)
    words = (bits.view(k // WORD_ROWS, WORD_ROWS, count, n).to(torch.int64) * place).sum(dim=1)  # 0 ... 2^32 - 1
    return words.to(torch.int32)  # the upper half wraps to negative words
