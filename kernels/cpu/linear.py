"""Matrix products with a prepared weight, and the rows of an embedding table."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.cpu import dense
from kernels.cpu.dense import HalfPrepared
from kernels.cpu.packed import PackedPrepared
from kernels.cpu.product import multiply
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
    """A plain look-up where the table is whole (first row 0 and every id in it); see `ops.embedding`."""
    table = rows_of(table)
    if first_row == 0 and int(ids.max()) < table.shape[0]:
        return F.embedding(ids, table)  # [T, H]
    return reference.embedding(ids, table, first_row)


@lru_cache(maxsize=64)
def _every_row(tokens: int) -> tuple[Tensor, Tensor]:
    """One segment with an entry for each row of x, which is that of the result."""
    return torch.tensor([[0, 0, tokens]]), torch.arange(tokens).unsqueeze(1).repeat(1, 2)
