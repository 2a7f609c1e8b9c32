"""Matrix products with a prepared weight, and the rows of an embedding table."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import dense
from kernels.cpu.dense import HalfPrepared
from kernels.cpu.packed import PackedPrepared
from kernels.cpu.product import Segments, multiply
from kernels.cpu.threads import Stage, run
from kernels.prepared import Prepared
from kernels.reference.linear import rows_of


def linear(x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor:
    """Straight from the packed bytes where the weight is packed; see `ops.linear`."""
    if isinstance(weight, HalfPrepared):
        out = dense.multiply(x.float(), weight)
    elif isinstance(weight, PackedPrepared):
        tokens = x.shape[0]
        out = multiply(x, weight, *_every_row(tokens))
    else:
        return reference.linear(x, weight, bias)
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def embedding(ids: Tensor, table: Tensor | Prepared, first_row: int) -> Tensor:
    """Compiled for an fp32 table; see `ops.embedding`."""
    table = rows_of(table)
    if table.dtype != torch.float32 or not table.is_contiguous():
        return reference.embedding(ids, table, first_row)
    out = torch.empty(len(ids), table.shape[1])
    wide = ids.long().contiguous()
    arguments = (len(ids), *table.shape, wide.data_ptr(), first_row, table.data_ptr(), out.data_ptr())
    run(Stage("look_up", arguments, tasks=len(ids), num_bytes=8 * out.numel()))
    return out


@lru_cache(maxsize=64)
def _every_row(tokens: int) -> tuple[Segments, Tensor]:
    """One segment with an entry for each row of x, which is that of the result."""
    with torch.inference_mode(False):  # kept, and wanted in any mode
        segment = Segments(torch.tensor([[0, 0, tokens]]), torch.ones(1, dtype=torch.int64))
        return segment, torch.arange(tokens).unsqueeze(1).repeat(1, 2)
