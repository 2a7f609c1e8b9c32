"""What each weight format means: packed operand -> dense [..., N, K]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

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

GROUP = 64
"""Rows that share a CCQ group scale."""


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Decode `weight` to [..., N, K] in `dtype`: exact arithmetic in fp32, then one rounding.

    Stacked experts are decoded one by one into the result, so that the fp32 copy in flight is one expert's.
    """
    if isinstance(weight, DenseWeight):
        return weight.weight.to(dtype)
    if isinstance(weight, Int8Weight):
        return _each(_int8, (weight.values, weight.scale), dtype)
    if isinstance(weight, Int4Weight):
        return _each(_int4, (weight.packed, weight.scale), dtype)
    if isinstance(weight, CcqWeight):
        decode = _ccq_permuted if weight.row_order == "permuted" else _ccq
        tensors = (weight.codes, weight.group_scales, weight.super_scales, weight.code_scale, weight.code_zp)
        return _each(decode, tensors, dtype)
    if isinstance(weight, BitplaneWeight):
        return _each(_bitplane, (weight.planes, weight.coefficients), dtype, dims=3)
    if isinstance(weight, GroupedWeight):
        return _each(partial(_grouped, bits=weight.bits), (weight.codes, weight.zeros, weight.scales), dtype)
    if isinstance(weight, SplitWeight):
        return torch.cat([dequantize(part, dtype) for part in weight.parts], dim=-1)
    raise TypeError(f"{type(weight).__name__} is not a weight operand; see kernels.operands")


def _each(decode: Callable[..., Tensor], tensors: tuple[Tensor, ...], dtype: torch.dtype, *, dims: int = 2) -> Tensor:
    """Decode one matrix, whose first tensor has ``dims`` dimensions, or a stack of them."""
    if tensors[0].dim() == dims:
        return decode(*tensors).to(dtype)
    first = decode(*(t[0] for t in tensors))
    out = first.new_empty((tensors[0].shape[0], *first.shape), dtype=dtype)  # [E, N, K]
    out[0] = first
    for e in range(1, out.shape[0]):
        out[e] = decode(*(t[e] for t in tensors))
    return out


def _int8(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale.float().unsqueeze(-1)  # [N, K]


def _int4(packed: Tensor, scale: Tensor) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # [N, K/2] -> [N, K]
    return (nibbles.to(torch.float32) - 8) * scale.float().unsqueeze(-1)


def _ccq(codes: Tensor, group_scales: Tensor, super_scales: Tensor, code_scale: Tensor, code_zp: Tensor) -> Tensor:
    """CCQ (arXiv 2507.07145) in the order of the stored rows.

    A byte is scaled to a 15-bit word whose four overlapping 6-bit windows are four consecutive rows. The multiply and
    the additions are separate roundings, as in the reference decoder; all other products are exact in fp32.
    """
    packed, n = codes.shape
    rows = packed * 4
    words = torch.floor(codes.float() * code_scale + code_zp + 0.5).to(torch.int32)  # [K/4, N]; may be negative
    shifts = torch.tensor([9, 6, 3, 0], dtype=torch.int32, device=codes.device).view(1, 4, 1)
    values = ((words.unsqueeze(1) >> shifts) & 0x3F) - 32  # [K/4, 4, N], -32..31
    scales = torch.stack((group_scales >> 4, group_scales & 15), dim=1).flatten(0, 1)  # even group = high nibble
    scales = scales[: rows // GROUP].to(torch.float32).unsqueeze(1)  # [K/64, 1, N]
    dense = values.view(rows // GROUP, GROUP, n).to(torch.float32) * scales * super_scales.float()
    return dense.view(rows, n).t()  # [N, K]


def _ccq_permuted(
    codes: Tensor, group_scales: Tensor, super_scales: Tensor, code_scale: Tensor, code_zp: Tensor
) -> Tensor:
    """CCQ with stored row 16a + 2b + c of each group of 64 holding logical row 8b + 2a + c (FastDeploy >= 2.1)."""
    stored = _ccq(codes, group_scales, super_scales, code_scale, code_zp)  # [N, K]
    n, k = stored.shape
    return stored.reshape(n, k // GROUP, 4, 8, 2).transpose(2, 3).reshape(n, k)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [R, N] -> int32 [R*32/bits, N], 0 ... 2^bits - 1: the rows of each word, its lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(1, -1, 1)
    values: Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)  # the mask drops the sign's copies
    return values.flatten(0, 1)


def _bitplane(planes: Tensor, coefficients: Tensor) -> Tensor:
    """Bit planes [K/32, k, N] and coefficients [K/G, k+1, N]: c0, then the planes added in their order."""
    words, count, n = planes.shape
    groups = coefficients.shape[0]
    values = coefficients.float()
    dense: Tensor = values[:, count:].expand(groups, words * 32 // groups, n)  # c0 is the last; [K/G, G, N]
    for i in range(count):
        bits = unpack_words(planes[:, i], 1).view(dense.shape)
        dense = dense + bits * values[:, i : i + 1]
    return dense.reshape(words * 32, n).t()  # [N, K]


def _grouped(codes: Tensor, zeros: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """Integers in words [K*bits/32, N], zero points and scales [K/G, N]."""
    groups, n = scales.shape
    values = unpack_words(codes, bits).view(groups, -1, n)  # [K/G, G, N]
    dense = (values - zeros.to(torch.int32).unsqueeze(1)) * scales.float().unsqueeze(1)
    return dense.view(-1, n).t()  # [N, K]
