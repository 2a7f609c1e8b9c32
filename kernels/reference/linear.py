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


def linear(x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor:
    """[T, K] -> [T, N]."""
    return F.linear(x, dense(weight).weight, bias)


def embedding(ids: Tensor, table: Tensor, first_row: int) -> Tensor:
    """Rows of `table`; zeros for ids that stand in another rank's rows."""
    local = ids.long() - first_row  # [T]
    here = (local >= 0) & (local < table.shape[0])
    return F.embedding(local.where(here, 0), table) * here.unsqueeze(-1)  # [T, H]
