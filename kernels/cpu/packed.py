"""Weights that stay packed, in the layout the compiled kernels read.

For each output feature its codes lie together, in chunks of 256 input features (`kernels.cpu.vector`); K is filled up
to whole chunks. Nothing is rounded: decoded, they are the reference's numbers to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.layout import CCQ, CHUNK, CODE_BYTES, INT4, INT8, LINE, LINE_AT, OFFSETS, TABLE_BYTES
from kernels.cpu.memory import bytes_for
from kernels.operands import CcqWeight, Int4Weight, Int8Weight


@dataclass(frozen=True)
class PackedPrepared:
    """One matrix, or a stack of experts, packed.

    Attributes:
        kind: CCQ, LINE, INT4 or INT8.
        in_features: K.
        codes: uint8 [E, N, bytes]; E is 1 for a single matrix.
        scales: uint8 [E, N, chunks * 2], nibbles; CCQ and LINE only, else empty.
        factor: fp32 [E, N].
        table: uint8 [E, TABLE_BYTES], the codebook that all columns of a matrix have; empty if those of one differ.
        code_scale: fp32 [E, N], likewise empty where `table` is not.
        code_zp: likewise.
        order: int32 [256]: which feature of a chunk stands at a place of its planes.
    """

    kind: int
    in_features: int
    codes: Tensor
    scales: Tensor
    factor: Tensor
    table: Tensor
    code_scale: Tensor
    code_zp: Tensor
    order: np.ndarray

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[1]

    @cached_property
    def num_bytes(self) -> int:
        """Memory it takes."""
        tensors = (self.codes, self.scales, self.factor, self.table, self.code_scale, self.code_zp)
        return sum(t.numel() * t.element_size() for t in tensors)

    @cached_property
    def matrix_bytes(self) -> int:
        """Of that, one matrix of the stack."""
        return self.num_bytes // self.codes.shape[0]

    @cached_property
    def order_address(self) -> int:
        """Where `order` is."""
        return self.order.ctypes.data

    @cached_property
    def chunks(self) -> int:
        """Chunks of a row."""
        return -(-self.in_features // CHUNK)

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Codes, scales, tables or 0, factor, code scale, code zero: they never move."""
        tensors = (self.codes, self.scales, self.table, self.factor, self.code_scale, self.code_zp)
        return tuple(t.data_ptr() if t.numel() else 0 for t in tensors)


def pack(weight: CcqWeight | Int4Weight | Int8Weight) -> PackedPrepared:
    """Lay a weight out for the kernels, expert by expert, so that no more than one of them is in flight."""
    if isinstance(weight, CcqWeight):
        return _pack_ccq(weight)
    kind, source = (INT8, weight.values) if isinstance(weight, Int8Weight) else (INT4, weight.packed)
    stack = source if source.dim() == 3 else source.unsqueeze(0)  # [E, N, K or K/2]
    k = stack.shape[2] * (2 if kind == INT4 else 1)
    codes = bytes_for(*stack.shape[:2], -(-k // CHUNK) * CODE_BYTES[kind])
    for e, part in enumerate(stack):
        codes[e] = _int4_chunks(part) if kind == INT4 else _int8_chunks(part)
    return PackedPrepared(
        kind=kind,
        in_features=k,
        codes=codes,
        scales=torch.empty(0, dtype=torch.uint8),
        factor=weight.scale.float().reshape(stack.shape[:2]).contiguous(),
        table=torch.empty(0, dtype=torch.uint8),
        code_scale=torch.empty(0),
        code_zp=torch.empty(0),
        order=_order("plain"),
    )


def _pack_ccq(weight: CcqWeight) -> PackedPrepared:
    codes, group_scales = (t if t.dim() == 3 else t.unsqueeze(0) for t in (weight.codes, weight.group_scales))
    experts, words, n = codes.shape
    chunks = -(-words // CODE_BYTES[CCQ])
    out = bytes_for(experts, n, chunks * CODE_BYTES[CCQ])
    scales = bytes_for(experts, n, chunks * 2)
    for e in range(experts):
        out[e, :, :words] = codes[e].t()
        scales[e, :, : group_scales.shape[1]] = group_scales[e].t()
    if (words // 16) % 2:  # the nibble of no group
        scales[:, :, group_scales.shape[1] - 1] &= 0xF0
    factor, scale, zero = (
        t.float().reshape(experts, n).contiguous() for t in (weight.super_scales, weight.code_scale, weight.code_zp)
    )
    table, kind = torch.empty(0, dtype=torch.uint8), CCQ
    if bool(((scale == scale[:, :1]) & (zero == zero[:, :1])).all()):
        table, is_line = _shared(scale[:, 0], zero[:, 0])
        kind = LINE if is_line else CCQ
        scale = zero = torch.empty(0)
    return PackedPrepared(
        kind=kind,
        in_features=words * 4,
        codes=out,
        scales=scales,
        factor=factor,
        table=table,
        code_scale=scale,
        code_zp=zero,
        order=_order(weight.row_order, line=kind == LINE),
    )


def codebook(scale: Tensor, zero: Tensor) -> Tensor:
    """The four windows of every byte, uint8 [4 * 256]: the arithmetic of `kernels.reference.dequantize`."""
    words = torch.floor(torch.arange(256, dtype=torch.float32) * scale + zero + 0.5).to(torch.int32)
    return torch.cat([(words >> shift) & 63 for shift in (9, 6, 3, 0)]).to(torch.uint8)


def _shared(scale: Tensor, zero: Tensor) -> tuple[Tensor, bool]:
    """Tables of one codebook a matrix, from fp32 [E] each, and whether all of them are `LINE`."""
    tables = torch.zeros(len(scale), TABLE_BYTES, dtype=torch.uint8)
    lines = [_line(codebook(s, z), s, z) for s, z in zip(scale, zero, strict=True)]
    for table, s, z, line in zip(tables, scale, zero, lines, strict=True):
        table[:LINE_AT] = codebook(s, z)
        if line is not None:
            table[LINE_AT : LINE_AT + 4] = torch.tensor([byte for i in line for byte in (i & 255, i >> 8)])
    return tables, None not in lines


def _line(table: Tensor, scale: Tensor, zero: Tensor) -> tuple[int, int] | None:
    """a and b with which ``(u a + b) >> 1`` are the words of a codebook; in 16 bits, since windows take only 15."""
    if not bool(torch.isfinite(scale) & torch.isfinite(zero)):
        return None
    a, b = round(2 * float(scale)), round(2 * float(zero)) + 1
    words = (torch.arange(256) * a + b) >> 1
    windows = torch.cat([(words >> shift) & 63 for shift in (9, 6, 3, 0)])
    return (a & 0xFFFF, b & 0xFFFF) if torch.equal(windows.to(torch.uint8), table) else None


def _order(row_order: str, *, line: bool = False) -> np.ndarray:
    stored = np.arange(CHUNK, dtype=np.int32).reshape(64, 4).T.reshape(-1)  # plane j, byte r: stored row 4r + j
    if line:
        plane, lane, r = np.unravel_index(np.arange(CHUNK), (4, 16, 4))
        code = 16 * (lane // 4) + 8 * (plane // 2) + 4 * (lane // 2 % 2) + r
        stored = (4 * code + 2 * (plane % 2) + lane % 2).astype(np.int32)
    if row_order == "plain":
        return stored
    a, b, c = (stored % 64) // 16, (stored % 16) // 2, stored % 2
    return (stored // 64 * 64 + 8 * b + 2 * a + c).astype(np.int32)


def _chunked(values: Tensor, fill: int) -> Tensor:
    """[N, K] -> [N, chunks, 4, 64], the planes."""
    n, k = values.shape
    filled = torch.full((n, -(-k // CHUNK) * CHUNK), fill, dtype=torch.uint8)
    filled[:, :k] = values
    return filled.view(n, -1, 64, 4).transpose(2, 3)


def _int8_chunks(values: Tensor) -> Tensor:
    unsigned = values.contiguous().view(torch.uint8) ^ 128  # two's complement plus 128
    return _chunked(unsigned, OFFSETS[INT8]).reshape(len(values), -1)


def _int4_chunks(packed: Tensor) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # [N, K]
    planes = _chunked(nibbles, OFFSETS[INT4])
    return (planes[:, :, ::2] | planes[:, :, 1::2] << 4).reshape(len(packed), -1)
