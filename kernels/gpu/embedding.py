"""The rows of an embedding table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.variant import Variant

BLOCK = 1024
WARPS = 4


def embedding(ids: Tensor, table: Tensor, first_row: int) -> Tensor:
    """Rows of a rank's part of the table, zeros for other ranks' ids: [T] -> [T, H]; see `ops.embedding`."""
    rows, width = table.shape
    out = torch.empty((len(ids), width), dtype=table.dtype, device=table.device)
    grid = (len(ids), triton.cdiv(width, BLOCK))
    look_up[grid](ids, table, out, first_row, rows, width, BLOCK=BLOCK, num_warps=WARPS)
    return out


@triton.jit(do_not_specialize=["first_row"])
def look_up(ids, table, out, first_row, rows, width, BLOCK: tl.constexpr):
    """Grid (T, H / BLOCK). A row of another rank is not read."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token).to(tl.int64) - first_row
    stored = tl.where((row >= 0) & (row < rows), width, 0)  # columns there are of it
    value = tl.load(table + row * width + at, mask=at < stored, other=0.0)
    tl.store(out + token * width + at, value, mask=at < width)


def variants() -> list[Variant]:
    """In bf16."""
    signature = {"ids": "*i32", "table": "*bf16", "out": "*bf16", "first_row": "i32", "rows": "i32", "width": "i32"}
    return [
        Variant(
            "embedding",
            look_up,
            signature=signature,
            constexprs={"BLOCK": BLOCK},
            num_warps=WARPS,
            num_stages=1,
            aligned=("ids", "table", "out", "rows", "width"),
        )
    ]
