"""Matrices of a checkpoint, cut and in the kernels' layouts, whatever names, format and cut they stand in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.checkpoint.folders import Checkpoint
from engine.checkpoint.joins import join_columns, join_rows, map_tensors, tensors
from engine.checkpoint.names import Naming
from engine.checkpoint.partition import MatrixCut, Partition, Piece, pieces
from engine.checkpoint.reader import FLOATS
from engine.errors import CheckpointError
from engine.quantization.format import WeightFormat
from kernels.operands import SplitWeight, Weight

Cut = Callable[[Partition], MatrixCut]
"""How a matrix is cut: what each rank of any number of ranks has of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixReader:
    """Reads a rank's share of matrices by our names.

    Attributes:
        checkpoint: where they stand, whole or cut.
        naming: under which names.
        wanted: the rank to read for.
        device: where the share goes.
        on_read: hears the full name of every tensor that is read.
    """

    checkpoint: Checkpoint
    naming: Naming
    wanted: Partition
    device: torch.device
    on_read: Callable[[str], None]

    @property
    def held(self) -> list[Partition]:
        """What each part of the checkpoint was cut for."""
        count = len(self.checkpoint.parts)
        return [dataclasses.replace(self.wanted, rank=rank, world_size=count) for rank in range(count)]

    def matrix(self, module: str, weight_format: WeightFormat, cut: Cut) -> Weight:
        """The share of one matrix, on the device."""
        return map_tensors(self._load(module, weight_format, cut), lambda tensor: tensor.to(self.device))

    def stack(self, modules: Sequence[str], weight_format: WeightFormat, cut: Cut, *, split: bool = False) -> Weight:
        """The shares of several matrices of one shape, stacked on the device; one at a time is on its way.

        With ``split``, parts stay apart along K even where they could be joined.
        """
        first = self._load(modules[0], weight_format, cut, split=split)
        split = isinstance(first, SplitWeight)
        stack = map_tensors(
            first, lambda part: torch.empty((len(modules), *part.shape), dtype=part.dtype, device=self.device)
        )
        for i, module in enumerate(modules):
            share = first if i == 0 else self._load(module, weight_format, cut, split=split)
            if isinstance(share, SplitWeight) != split:
                # The parts were quantized each on its own, and those of the first matrix have equal scales by chance.
                del stack
                return self.stack(modules, weight_format, cut, split=True)
            for target, source in zip(tensors(stack), tensors(share), strict=True):
                target[i].copy_(source)
            self.checkpoint.release()
        return stack

    def bias(self, module: str, cut: Cut) -> Tensor | None:
        """The share of a linear's bias, [N]; None if there is none."""
        stored = self._stored(module, cut)
        if not any(f"{prefix}.bias" in self.checkpoint for prefix, _, _ in stored):
            return None
        shares = []
        for prefix, grid, held in stored:
            name = f"{prefix}.bias"
            for piece in grid[0]:
                bias = self.checkpoint.read(piece.part, name, shape=(_width(held[piece.part]),), dtypes=FLOATS)
                shares += [bias[span.start : span.stop] for span in piece.columns]
            self.on_read(name)
        return torch.cat(shares)

    def _load(self, module: str, weight_format: WeightFormat, cut: Cut, *, split: bool = False) -> Weight:
        shares = [
            join_rows(
                [
                    join_columns([self._load_piece(prefix, weight_format, piece, held[piece.part]) for piece in row])
                    for row in grid
                ],
                split=split,
            )
            for prefix, grid, held in self._stored(module, cut)
        ]
        return join_columns(shares)

    def _stored(self, module: str, cut: Cut) -> list[tuple[str, list[list[Piece]], list[MatrixCut]]]:
        """The linears that together are ``module``: name, the pieces of it to read, and what each part holds of it."""
        wanted, held = cut(self.wanted), [cut(part) for part in self.held]
        prefixes = self.naming.parts(module)
        if len(prefixes) == 1:
            return [(prefixes[0], pieces(wanted, held), held)]
        stored = []
        for b, prefix in enumerate(prefixes):  # q, k, v or gate, up apart: a block of columns each
            blocks = [dataclasses.replace(cut, blocks=(cut.blocks[b],)) for cut in held]
            share = dataclasses.replace(wanted, blocks=(wanted.blocks[b],))
            stored.append((prefix, pieces(share, blocks), blocks))
        return stored

    def _load_piece(self, prefix: str, weight_format: WeightFormat, piece: Piece, held: MatrixCut) -> Weight:
        stored: dict[str, Tensor] = {}
        for suffix, spec in weight_format.tensors(len(held.rows), _width(held)).items():
            names = [f"{prefix}.{known}" for known in (suffix, *spec.aliases)]
            name = next((name for name in names if name in self.checkpoint), None)
            if name is None:
                raise CheckpointError(self._missing(prefix, names[0], weight_format))
            transposed = self.naming.out_in and len(spec.shape) == 2
            shape = spec.shape[::-1] if transposed else spec.shape
            tensor = self.checkpoint.read(piece.part, name, shape=shape, dtypes=spec.dtypes)
            self.on_read(name)
            stored[suffix] = tensor.T if transposed else tensor
        return weight_format.load(stored, rows=piece.rows, columns=piece.columns)

    def _missing(self, prefix: str, name: str, weight_format: WeightFormat) -> str:
        found = sorted(other.removeprefix(f"{prefix}.") for other in self.checkpoint if other.startswith(f"{prefix}."))
        return (
            f"{self.checkpoint.folder} has no tensor {name!r}; by its config.json, {prefix} is in format "
            f"{weight_format.name}" + (f", but the files have its {', '.join(found)}" if found else "")
        )


def _width(held: MatrixCut) -> int:
    return sum(len(block.part) for block in held.blocks)
