"""Matrices of a checkpoint, cut and in the kernels' layouts, whatever names and format they stand in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.checkpoint.names import Naming
from engine.checkpoint.partition import MatrixCut
from engine.checkpoint.reader import CheckpointReader
from engine.errors import CheckpointError
from engine.quantization.format import Span, WeightFormat
from kernels.operands import DenseWeight, Weight

_W = TypeVar("_W", bound=Weight)


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixReader:
    """Reads matrices by our names. ``on_read`` hears the full name of every tensor that is read."""

    reader: CheckpointReader
    naming: Naming
    device: torch.device
    on_read: Callable[[str], None]

    def matrix(self, module: str, weight_format: WeightFormat, cut: MatrixCut) -> Weight:
        """A rank's part of one matrix, on the device."""
        return _map_tensors(self._load(module, weight_format, cut), lambda tensor: tensor.to(self.device))

    def stack(self, modules: Sequence[str], weight_format: WeightFormat, cut: MatrixCut) -> Weight:
        """A rank's parts of several matrices of one shape, stacked on the device; one at a time is on its way."""
        first = self._load(modules[0], weight_format, cut)
        stack = _map_tensors(
            first, lambda part: torch.empty((len(modules), *part.shape), dtype=part.dtype, device=self.device)
        )
        for i, module in enumerate(modules):
            part = first if i == 0 else self._load(module, weight_format, cut)
            for target, source in zip(_tensors(stack), _tensors(part), strict=True):
                target[i].copy_(source)
        return stack

    def _load(self, module: str, weight_format: WeightFormat, cut: MatrixCut) -> Weight:
        parts = self.naming.parts(module)
        if len(parts) == 1:
            columns, n = [], 0
            for block in cut.blocks:
                columns.append(Span(n + block.part.start, n + block.part.stop))
                n += block.width
            return self._load_part(parts[0], weight_format, cut, n=n, columns=columns)
        pieces = [
            self._load_part(part, weight_format, cut, n=block.width, columns=[block.part])
            for part, block in zip(parts, cut.blocks, strict=True)
        ]
        # Only torch names keep q, k, v or gate, up apart, and those are never quantized (see ShardedWeights).
        return DenseWeight(torch.cat([piece.weight for piece in pieces if isinstance(piece, DenseWeight)]))

    def _load_part(
        self, prefix: str, weight_format: WeightFormat, cut: MatrixCut, *, n: int, columns: Sequence[Span]
    ) -> Weight:
        tensors: dict[str, Tensor] = {}
        for suffix, spec in weight_format.tensors(cut.k, n).items():
            names = [f"{prefix}.{known}" for known in (suffix, *spec.aliases)]
            name = next((name for name in names if name in self.reader), None)
            if name is None:
                raise CheckpointError(self._missing(prefix, names[0], weight_format))
            transposed = self.naming.out_in and len(spec.shape) == 2
            shape = spec.shape[::-1] if transposed else spec.shape
            tensor = self.reader.read(name, shape=shape, dtypes=spec.dtypes)
            self.on_read(name)
            tensors[suffix] = tensor.T if transposed else tensor
        return weight_format.load(tensors, rows=cut.rows, columns=columns)

    def _missing(self, prefix: str, name: str, weight_format: WeightFormat) -> str:
        found = sorted(other.removeprefix(f"{prefix}.") for other in self.reader if other.startswith(f"{prefix}."))
        return (
            f"{self.reader.folder} has no tensor {name!r}; by its config.json, {prefix} is in format "
            f"{weight_format.name}" + (f", but the files have its {', '.join(found)}" if found else "")
        )


def _tensors(weight: Weight) -> list[Tensor]:
    values = (getattr(weight, field.name) for field in dataclasses.fields(weight))
    return [value for value in values if isinstance(value, Tensor)]


def _map_tensors(weight: _W, change: Callable[[Tensor], Tensor]) -> _W:
    changed: dict[str, Any] = {
        field.name: change(value)
        for field in dataclasses.fields(weight)
        if isinstance(value := getattr(weight, field.name), Tensor)
    }
    return dataclasses.replace(weight, **changed)
