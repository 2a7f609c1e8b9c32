"""The rows of an embedding table, dense or packed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.linear import prepare
from kernels.gpu.packed import GpuPrepared, Packed
from kernels.gpu.variant import Variant
from kernels.operands import Weight
from kernels.prepared import DensePrepared, Prepared

BLOCK = 1024
WARPS = 4
LAYOUTS = ("int8", "grouped")
"""Packed layouts whose rows can be looked up."""


def prepare_embedding(weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Tensor | Prepared:
    """As for `linear` where rows can be looked up in that, decoded otherwise; see `ops.prepare_embedding`."""
    prepared = prepare(weight, dtype=dtype, device=device)
    if isinstance(prepared, DensePrepared):
        return prepared.weight
    if isinstance(prepared, GpuPrepared) and all(part.layout in LAYOUTS for part in prepared.parts):
        return prepared
    raise TypeError(f"{type(weight).__name__} can't be an embedding table; dense, int8 and grouped integers can")


def embedding(ids: Tensor, table: Tensor | Prepared, first_row: int) -> Tensor:
    """Rows of a rank's part of the table, zeros for other ranks' ids: [T] -> [T, H]; see `ops.embedding`."""
    if isinstance(table, GpuPrepared):
        return _packed(ids, table, first_row)
    if not isinstance(table, Tensor):
        raise TypeError(f"table is {type(table).__name__}, prepared for another device; see ops.prepare_embedding")
    rows, width = table.shape
    out = torch.empty((len(ids), width), dtype=table.dtype, device=table.device)
    grid = (len(ids), triton.cdiv(width, BLOCK))
    look_up[grid](ids, table, out, first_row, rows, width, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)
    return out


def _packed(ids: Tensor, table: GpuPrepared, first_row: int) -> Tensor:
    out = torch.empty((len(ids), table.in_features), dtype=table.dtype, device=ids.device)
    start = 0
    for part in table.parts:
        _look_up_part(ids, part, out[:, start : start + part.in_features], first_row)
        start += part.in_features
    return out


def _look_up_part(ids: Tensor, part: Packed, out: Tensor, first_row: int) -> None:
    grouped = part.layout == "grouped"
    look_up_packed[(len(ids), triton.cdiv(part.in_features, BLOCK))](
        ids,
        part.codes,
        part.group_scales if grouped else part.column_scale,
        part.zeros if grouped else part.codes,
        out,
        first_row,
        part.out_features,
        part.in_features,
        out.stride(0),
        WIDTH=part.width or 8,
        ELEMENTS=part.elements,
        GROUP_SIZE=part.group_size,
        GROUPED=grouped,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["first_row"])
def look_up(ids, table, out, first_row, rows, width, BLOCK: tl.constexpr):
    """Grid (T, H / BLOCK). A row of another rank is not read."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token).to(tl.int64) - first_row
    stored = tl.where((row >= 0) & (row < rows), width, 0)  # columns there are of it
    value = tl.load(table + row * width + at, mask=at < stored, other=0.0)
    tl.store(out + token * width + at, value, mask=at < width)


@triton.jit(do_not_specialize=["first_row"])
def look_up_packed(
    ids, codes, scales, zeros, out, first_row, rows, width, stride,
    WIDTH: tl.constexpr, ELEMENTS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (T, H / BLOCK): column `row` of `kernels.gpu.packed`'s tiles, which is a row of the table.

    A thread reads its feature's element, its neighbours the same: the bytes of a tile's column stand together.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token).to(tl.int64) - first_row
    stored = tl.where((row >= 0) & (row < rows), width, 0)
    here = at < stored
    FIELDS: tl.constexpr = 16 // WIDTH if GROUPED else 1
    element = at // FIELDS  # a tile's elements hold its features in order
    place = (element // ELEMENTS * rows + row) * ELEMENTS + element % ELEMENTS
    code = tl.load(codes + place, mask=here, other=0).to(tl.int32)
    if GROUPED:
        code = code >> (at % FIELDS * WIDTH) & ((1 << WIDTH) - 1)
        group = at // GROUP_SIZE * rows + row
        zero = tl.load(zeros + group, mask=here, other=0).to(tl.int32)
        scale = tl.load(scales + group, mask=here, other=0.0).to(tl.float32)
    else:
        zero = tl.full((), 128, dtype=tl.int32)
        scale = tl.load(scales + row, mask=stored > 0, other=0.0).to(tl.float32)
    value = (code - zero).to(tl.float32) * scale
    tl.store(out + token * stride + at, tl.where(here, value, 0.0).to(out.dtype.element_ty), mask=at < width)


def variants() -> list[Variant]:
    """In bf16, and in 4 bits with groups of 128."""
    sizes = {"first_row": "i32", "rows": "i32", "width": "i32"}
    packed = {"ids": "*i32", "codes": "*i16", "scales": "*fp16", "zeros": "*u8", "out": "*bf16"}
    return [
        Variant(
            "embedding",
            look_up,
            signature={"ids": "*i32", "table": "*bf16", "out": "*bf16", **sizes},
            constexprs={"BLOCK": BLOCK},
            num_warps=WARPS,
            num_stages=1,
            aligned=("ids", "table", "out", "rows", "width"),
        ),
        Variant(
            "embedding int4",
            look_up_packed,
            signature={**packed, **sizes, "stride": "i32"},
            constexprs={"WIDTH": 4, "ELEMENTS": 32, "GROUP_SIZE": 128, "GROUPED": True, "BLOCK": BLOCK},
            num_warps=WARPS,
            num_stages=1,
            aligned=(*packed, "rows", "width", "stride"),
        ),
    ]
