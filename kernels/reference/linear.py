"""Matrix products with a prepared weight, and the rows of an embedding table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operands import Weight
from kernels.prepared import DensePrepared, Prepared, dense
from kernels.reference.dequantize import dequantize


def prepare(weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Decode to dense in `dtype` on `device`."""
    return DensePrepared.of(dequantize(weight, dtype).to(device).contiguous())


def prepare_embedding(weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Decode to a table [rows, H] in `dtype` on `device`."""
    return dequantize(weight, dtype).to(device).contiguous()


def linear(x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor:
    """[T, K] -> [T, N]."""
    return F.linear(x, dense(weight).weight, bias)


def embedding(ids: Tensor, table: Tensor | Prepared, first_row: int) -> Tensor:
    """Rows of `table`; zeros for ids that stand in another rank's rows."""
    table = rows_of(table)
    local = ids.long() - first_row  # [T]
    here = (local >= 0) & (local < table.shape[0])
    return F.embedding(local.where(here, 0), table) * here.unsqueeze(-1)  # [T, H]


def rows_of(table: Tensor | Prepared) -> Tensor:
    """A table that `prepare_embedding` made here. Raises TypeError for another backend's."""
    if not isinstance(table, Tensor):
        raise TypeError(f"table is {type(table).__name__}, prepared for another device; see ops.prepare_embedding")
    return table
