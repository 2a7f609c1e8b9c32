"""Weights as the kernels take them: one type for each format, plain tensors in a documented layout.

``K`` is the number of input features, ``N`` of output features. Every tensor may carry one leading dimension ``E``
(stacked experts). These layouts are Dibit's own; ``engine.quantization`` makes them from what stands in a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """An unquantized matrix. ``weight`` [..., N, K], any floating dtype."""

    weight: Tensor


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """``w[n, k] = values[n, k] * scale[n]``. ``values`` int8 [..., N, K]; ``scale`` [..., N]."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """``w[n, k] = (nibble - 8) * scale[n]``.

    ``packed`` uint8 [..., N, K/2]: the low nibble is k = 2j, the high one k = 2j+1. ``scale`` [..., N].
    """

    packed: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class CcqWeight:
    """WINT2: 2-bit convolutional code (CCQ, arXiv 2507.07145), in the stored layout of Baidu's files.

    ``codes`` uint8 [..., K/4, N], ``group_scales`` uint8 [..., K/128, N] (two 4-bit scales of 64 rows each, the even
    group in the high nibble), ``super_scales`` bf16 [..., N], ``code_scale`` and ``code_zp`` fp32 [..., N].
    A rank's cut may hold an odd number of groups; then the last row of ``group_scales`` has an unused low nibble.
    ``row_order``: "plain", or "permuted" inside each group of 64 rows (FastDeploy >= 2.1).
    """

    codes: Tensor
    group_scales: Tensor
    super_scales: Tensor
    code_scale: Tensor
    code_zp: Tensor
    row_order: Literal["plain", "permuted"]


@dataclass(frozen=True, slots=True)
class BitplaneWeight:
    """``w = c0 + c1 b1 + ... + ck bk``: k bits of a weight, coefficients of its group of rows (BPDQ, arXiv 2602.04163).

    ``planes`` int32 [..., K/32, k, N]: bit t of word j is row 32j + t. ``coefficients`` [..., K/G, k+1, N]: c1 ... ck,
    then c0.
    """

    planes: Tensor
    coefficients: Tensor


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """``w = (code - zero) * scale``, codes of ``bits`` (2, 4, 8) bits, zero and scale of a group of rows.

    ``codes`` int32 [..., K*bits/32, N]: a word holds neighbouring rows of a column, the first in its lowest bits.
    ``zeros`` uint8 [..., K/G, N], not packed (a rank's columns may start anywhere). ``scales`` [..., K/G, N].
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    bits: int


@dataclass(frozen=True, slots=True)
class SplitWeight:
    """Parts side by side along K, in its order, each with scales of its own; all have the same N (and E).

    What becomes of ranks' shares that were quantized each on its own, when fewer ranks serve them: one scale for a
    whole column can't hold them.
    """

    parts: tuple[Weight, ...]


Weight = DenseWeight | Int8Weight | Int4Weight | CcqWeight | BitplaneWeight | GroupedWeight | SplitWeight
