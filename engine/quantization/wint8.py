"""WINT8: 8-bit integers with one scale a column, in Paddle's interleaved layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from engine.checkpoint import paddle_layout
from engine.errors import UnsupportedError
from engine.quantization.format import Span, TensorSpec, WeightFormat
from kernels.operands import Int8Weight

SCALE_DTYPES = ("BF16", "F16", "F32")
_TILE = paddle_layout.TILE_ROWS
_COLUMNS = paddle_layout.INT8_TILE_COLUMNS


def dequantize(quant_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """bf16 [K, N] of Paddle's bytes [N, K] and scales [N]: ``(byte - 128) * scale``, one rounding."""
    return Wint8().dequantize({"quant_weight": quant_weight, "weight_scale": weight_scale})


class Wint8(WeightFormat):
    """``quant_weight`` [N, K] (a label: the bytes are interleaved), ``weight_scale`` [N]."""

    name: ClassVar[str] = "wint8"

    @property
    def row_tile(self) -> int:
        """Any row: tiles are taken apart."""
        return 1

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """Needs K in multiples of 64 and N of 2."""
        if k % _TILE or n % _COLUMNS:
            raise UnsupportedError(f"wint8 needs K in multiples of {_TILE} and N of {_COLUMNS}; found K={k}, N={n}")
        return {
            "quant_weight": TensorSpec((n, k), ("I8", "U8")),
            "weight_scale": TensorSpec((n,), SCALE_DTYPES),
        }

    def size(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(K, N)."""
        n, k = tensors["quant_weight"].shape
        return k, n

    def load(self, tensors: Mapping[str, Tensor], *, rows: Span, columns: Sequence[Span]) -> Int8Weight:
        """The part as plain integers [N, K]. Only the tiles it touches are read."""
        scale = tensors["weight_scale"]
        return Int8Weight(
            values=torch.cat([_cut(tensors["quant_weight"], rows, span) for span in columns]),
            scale=torch.cat([scale[span.start : span.stop] for span in columns]),
        )


def _cut(quant_weight: Tensor, rows: Span, columns: Span) -> Tensor:
    n, k = quant_weight.shape
    first_tile, first_row = columns.start // _COLUMNS, rows.start // _TILE
    tiles = quant_weight.reshape(n // _COLUMNS, k // _TILE, paddle_layout.TILE_BYTES)[
        first_tile : -(-columns.stop // _COLUMNS), first_row : -(-rows.stop // _TILE)
    ]
    values = paddle_layout.decode_int8(tiles.reshape(len(tiles) * _COLUMNS, -1)).T  # [N, K] of the touched tiles
    top, left = columns.start - first_tile * _COLUMNS, rows.start - first_row * _TILE
    return values[top : top + len(columns), left : left + len(rows)]
