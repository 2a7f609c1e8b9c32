"""WINT2: the 2-bit convolutional code (CCQ, arXiv 2507.07145) of Baidu's 2-bit checkpoints.

One byte holds four consecutive stored rows of a column. ``u * code_scale + code_zp`` picks one of 2^15 trellis words:
four windows of 6 bits, each 3 bits after the last. Two levels of scales multiply them: 4 bits for 64 rows, and bf16 for
a column. The arithmetic (``kernels.reference.dequantize``) is that of FastDeploy's published reference decoder.

**Row order.** Inside each group of 64 rows, "plain" (FastDeploy 2.0) stores row i at i; "permuted" (FastDeploy
>= 2.1) stores at 16a+2b+c (a 0..3, b 0..7, c 0..1) the row 8b+2a+c. A file does not say which it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.errors import ConfigError, UnsupportedError
from engine.quantization.format import RowOrder, Span, TensorSpec, WeightFormat
from kernels.operands import CcqWeight
from kernels.reference.dequantize import dequantize as dequantize_operand

ROW_ORDERS = ("plain", "permuted")
GROUP_ROWS = 64
WORD_ROWS = 4
ROW_ORDER_ADVICE = (
    'Set the option row_order: "permuted" for files made for FastDeploy >= 2.1 (July 2025), "plain" for 2.0'
)


def dequantize(
    quant_weight: Tensor,
    weight_scale: Tensor,
    super_scales: Tensor,
    code_scale: Tensor,
    code_zp: Tensor,
    *,
    row_order: RowOrder,
) -> Tensor:
    """The weights of a WINT2 matrix, or of a stack of them.

    Args:
        quant_weight: uint8 (or int8, read as unsigned) [..., K/4, N].
        weight_scale: likewise [..., ceil(K/128), N]; two 4-bit scales, the even group of 64 rows in the high nibble.
        super_scales: [..., N].
        code_scale: fp32 [..., N].
        code_zp: fp32 [..., N].
        row_order: see the module.

    Returns:
        bf16 [..., K, N] in logical row order, rounded once.
    """
    *lead, words, n = quant_weight.shape

    def stacked(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, *tensor.shape[len(lead) :])  # all leading dimensions as one

    operand = CcqWeight(
        codes=stacked(quant_weight).view(torch.uint8),
        group_scales=stacked(weight_scale).view(torch.uint8),
        super_scales=stacked(super_scales),
        code_scale=stacked(code_scale),
        code_zp=stacked(code_zp),
        row_order=row_order,
    )
    return dequantize_operand(operand, torch.bfloat16).mT.reshape(*lead, words * WORD_ROWS, n)


def stored_rows(groups: Tensor, row_order: RowOrder) -> Tensor:
    """Rows of each group from logical into stored order, [..., 64] -> [..., 64]."""
    if row_order == "plain":
        return groups
    return groups.reshape(*groups.shape[:-1], 8, 4, 2).transpose(-3, -2).reshape(groups.shape)


def unpack_scales(packed: Tensor, groups: int) -> Tensor:
    """uint8 [..., ceil(groups/2), N] -> uint8 [..., groups, N], 0..15; the even group is in the high nibble."""
    return torch.stack((packed >> 4, packed & 15), dim=-2).flatten(-3, -2)[..., :groups, :]


def pack_scales(scales: Tensor) -> Tensor:
    """The inverse of :func:`unpack_scales`; an odd last group leaves the last low nibble 0."""
    if scales.shape[-2] % 2:
        scales = torch.cat((scales, torch.zeros_like(scales[..., :1, :])), dim=-2)
    return (scales[..., ::2, :] << 4) | scales[..., 1::2, :]


@dataclass(frozen=True, slots=True)
class Wint2(WeightFormat):
    """``quant_weight`` [K/4, N], ``weight_scale`` [K/128, N], ``super_scales``, ``code_scale``, ``code_zp`` [N]."""

    name: ClassVar[str] = "wint2"

    row_order: RowOrder | None = None
    """None: not known (yet)."""

    def __post_init__(self) -> None:
        if self.row_order is not None and self.row_order not in ROW_ORDERS:
            raise ConfigError(f"row_order is {self.row_order!r}; expected one of {', '.join(ROW_ORDERS)}")

    @property
    def row_tile(self) -> int:
        """A group of rows has one scale."""
        return GROUP_ROWS

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """Needs K in multiples of 64; an odd number of groups leaves the last nibble of ``weight_scale`` unused."""
        if k % GROUP_ROWS:
            raise UnsupportedError(f"wint2 needs K in multiples of {GROUP_ROWS}; found K={k}, N={n}")
        return {
            "quant_weight": TensorSpec((k // WORD_ROWS, n), ("U8", "I8")),
            "weight_scale": TensorSpec((-(-k // (2 * GROUP_ROWS)), n), ("U8", "I8")),
            "super_scales": TensorSpec((n,), ("BF16", "F16", "F32"), aliases=("super_scale",)),
            "code_scale": TensorSpec((n,), ("F32",)),
            "code_zp": TensorSpec((n,), ("F32",)),
        }

    def size(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(K, N)."""
        words, n = tensors["quant_weight"].shape
        return words * WORD_ROWS, n

    def load(self, tensors: Mapping[str, Tensor], *, rows: Span, columns: Sequence[Span]) -> CcqWeight:
        """The part, still packed; nibble pairs are packed again where it starts at an odd group."""
        codes, packed = tensors["quant_weight"].view(torch.uint8), tensors["weight_scale"].view(torch.uint8)
        first, last = rows.start // GROUP_ROWS, rows.stop // GROUP_ROWS
        scales = unpack_scales(_columns(packed[first // 2 : -(-last // 2)], columns), last - first // 2 * 2)
        return CcqWeight(
            codes=_columns(codes[rows.start // WORD_ROWS : rows.stop // WORD_ROWS], columns),
            group_scales=pack_scales(scales[first % 2 :]),
            super_scales=_columns(tensors["super_scales"].bfloat16(), columns),
            code_scale=_columns(tensors["code_scale"], columns),
            code_zp=_columns(tensors["code_zp"], columns),
            row_order=self._known_order(),
        )

    def _known_order(self) -> RowOrder:
        if self.row_order is None:
            raise ConfigError(f"WINT2 weights of unknown row order. {ROW_ORDER_ADVICE}")
        return self.row_order


def _columns(tensor: Tensor, columns: Sequence[Span]) -> Tensor:
    return torch.cat([tensor[..., span.start : span.stop] for span in columns], dim=-1)
