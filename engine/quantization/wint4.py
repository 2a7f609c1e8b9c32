"""WINT4: 4-bit integers with one scale a column, in Paddle's interleaved layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from engine.checkpoint import paddle_layout
from engine.errors import UnsupportedError
from engine.quantization.format import Span, TensorSpec, WeightFormat
from engine.quantization.wint8 import SCALE_DTYPES
from kernels.operands import Int4Weight

_TILE = paddle_layout.TILE_ROWS
_COLUMNS = paddle_layout.INT4_TILE_COLUMNS


def dequantize(quant_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """bf16 [K, N] of Paddle's bytes [N/2, K] and scales [N]: ``(nibble - 8) * scale``, one rounding."""
    return Wint4().dequantize({"quant_weight": quant_weight, "weight_scale": weight_scale})


class Wint4(WeightFormat):
    """``quant_weight`` [N/2, K] (a label: the nibbles are interleaved), ``weight_scale`` [N]."""

    name: ClassVar[str] = "wint4"

    @property
    def row_tile(self) -> int:
        """The operand holds two rows in a byte."""
        return 2

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """Needs K in multiples of 64 and N of 4."""
        if k % _TILE or n % _COLUMNS:
            raise UnsupportedError(f"wint4 needs K in multiples of {_TILE} and N of {_COLUMNS}; found K={k}, N={n}")
        return {
            "quant_weight": TensorSpec((n // 2, k), ("I8", "U8")),
            "weight_scale": TensorSpec((n,), SCALE_DTYPES),
        }

    def size(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(K, N)."""
        half, k = tensors["quant_weight"].shape
        return k, 2 * half

    def load(self, tensors: Mapping[str, Tensor], *, rows: Span, columns: Sequence[Span]) -> Int4Weight:
        """The part as nibbles [N, K/2] in plain order. Only the tiles it touches are read."""
        scale = tensors["weight_scale"]
        return Int4Weight(
            packed=torch.cat([_cut(tensors["quant_weight"], rows, span) for span in columns]),
            scale=torch.cat([scale[span.start : span.stop] for span in columns]),
        )


def _cut(quant_weight: Tensor, rows: Span, columns: Span) -> Tensor:
    half, k = quant_weight.shape
    first_tile, first_row = columns.start // _COLUMNS, rows.start // _TILE
    tiles = quant_weight.reshape(2 * half // _COLUMNS, k // _TILE, paddle_layout.TILE_BYTES)[
        first_tile : -(-columns.stop // _COLUMNS), first_row : -(-rows.stop // _TILE)
    ]
    values = paddle_layout.decode_int4(tiles.reshape(len(tiles) * _COLUMNS // 2, -1)).T  # [N, K] of the touched tiles
    top, left = columns.start - first_tile * _COLUMNS, rows.start - first_row * _TILE
    nibbles = (values[top : top + len(columns), left : left + len(rows)] + 8).view(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
