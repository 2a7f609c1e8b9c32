"""Random weights of every format, small enough for Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference
from kernels.operands import (
    BitplaneWeight,
    CcqWeight,
    DenseWeight,
    GroupedWeight,
    Int4Weight,
    Int8Weight,
    SplitWeight,
    Weight,
)

CPU = torch.device("cpu")
WIDE = (120.94451141357422, 1254.2928466796875)
"""A pair of code_scale and code_zp whose words need 17 bits of fraction."""
PAIR = (120.5, 548.0)
"""One that needs a single bit."""


def dense(weight: Weight) -> Tensor:
    """The decoded weight, fp32."""
    return reference.dequantize(weight, torch.float32)


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def ccq(*lead: int, n: int, k: int, pair: tuple[float, float] | None = WIDE, order: str = "plain") -> CcqWeight:
    """One codebook, or with ``pair=None`` one for each column."""
    columns = (*lead, n)
    scale = torch.rand(columns) * 28 + 100 if pair is None else torch.full(columns, pair[0])
    zero = torch.rand(columns) * 1000 if pair is None else torch.full(columns, pair[1])
    groups = _bytes(*lead, -(-k // 128), n)
    supers = (torch.rand(columns) * 0.01).bfloat16()
    codes = _bytes(*lead, k // 4, n)
    return CcqWeight(codes, groups, supers, scale, zero, "permuted" if order == "permuted" else "plain")


def int8(*lead: int, n: int, k: int) -> Int8Weight:
    return Int8Weight(_bytes(*lead, n, k).view(torch.int8), torch.rand(*lead, n) * 0.01)


def int4(*lead: int, n: int, k: int) -> Int4Weight:
    return Int4Weight(_bytes(*lead, n, k // 2), torch.rand(*lead, n) * 0.1)


def planes(*lead: int, n: int, k: int, count: int = 2, group: int = 128) -> BitplaneWeight:
    words = torch.randint(-(2**31), 2**31, (*lead, k // 32, count, n), dtype=torch.int64).to(torch.int32)
    return BitplaneWeight(words, (torch.randn(*lead, k // group, count + 1, n) * 0.2).bfloat16())


def grouped(*lead: int, n: int, k: int, group: int = 64, bits: int = 4) -> GroupedWeight:
    codes = torch.randint(-(2**31), 2**31, (*lead, k * bits // 32, n), dtype=torch.int64).to(torch.int32)
    zeros = torch.randint(0, 2**bits, (*lead, k // group, n), dtype=torch.uint8)
    return GroupedWeight(codes, zeros, torch.rand(*lead, k // group, n) * 0.1, bits)


def plain(*lead: int, n: int, k: int) -> DenseWeight:
    return DenseWeight(torch.randn(*lead, n, k) * 0.2)


def split(*lead: int, n: int, k: int) -> SplitWeight:
    """Three formats side by side; `k` at least 192."""
    return SplitWeight((ccq(*lead, n=n, k=64), int8(*lead, n=n, k=k - 128), plain(*lead, n=n, k=64)))
