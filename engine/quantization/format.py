"""What every weight format knows about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from kernels.operands import Weight
from kernels.reference.dequantize import dequantize

RowOrder = Literal["plain", "permuted"]


class Span(NamedTuple):
    """Rows or columns ``start`` up to but not including ``stop``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a format: the shape it must have and the dtypes it may have, in safetensors' names."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    """Other suffixes under which some writer stores it."""


@dataclass(frozen=True, slots=True)
class WeightFormat(ABC):
    """How a matrix W [K, N] (K input, N output features) stands in a checkpoint, in Paddle's orientation.

    A value: its fields are the format's options, as ``quantization_config`` may give them.
    A format's tensors go by suffix: ``{"quant_weight": ..., "weight_scale": ...}``. They may be views of a mapped file;
    every result is a copy that the file can be closed under.
    """

    name: ClassVar[str]

    dtype: torch.dtype = field(default=torch.bfloat16, kw_only=True)
    """Dtype in which unquantized weights arrive, and dequantized ones. Not an option of the checkpoint."""

    @property
    @abstractmethod
    def row_tile(self) -> int:
        """K can be cut at multiples of this many rows. Columns can be cut anywhere."""

    @abstractmethod
    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """The tensors of a [K, N] matrix, by suffix. Raises UnsupportedError for a shape the format can't hold."""

    @abstractmethod
    def size(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(K, N) of the matrix that ``tensors`` hold."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], *, rows: Span, columns: Sequence[Span]) -> Weight:
        """A rank's part: ``rows`` of K (at multiples of ``row_tile``), the spans of N side by side in their order."""

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the tensors mean: [K, N] in ``dtype``, rounded once."""
        k, n = self.size(tensors)
        return dequantize(self.load(tensors, rows=Span(0, k), columns=[Span(0, n)]), self.dtype).T
