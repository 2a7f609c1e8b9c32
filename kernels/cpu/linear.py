"""Matrix products with a prepared weight, and the rows of an embedding table."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.cpu.packed import PackedPrepared
from kernels.cpu.product import multiply
from kernels.prepared import Prepared


def linear(x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor:
    """Straight from the packed bytes where the weight is packed; see `ops.linear`."""
    if not isinstance(weight, PackedPrepared):
        return reference.linear(x, weight, bias)
    tokens = x.shape[0]
    out = multiply(x, weight, np.array([[0, 0, tokens]]), _every_row(tokens))
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def embedding(ids: Tensor, table: Tensor, first_row: int) -> Tensor:
    """A plain look-up where the table is whole (first row 0 and every id in it); see `ops.embedding`."""
    if first_row == 0 and int(ids.max()) < table.shape[0]:
        return F.embedding(ids, table)  # [T, H]
    return reference.embedding(ids, table, first_row)


@lru_cache(maxsize=64)
def _every_row(tokens: int) -> np.ndarray:
    """int64 [T, 2]: each row of x is that of the result."""
    return np.stack([np.arange(tokens)] * 2, axis=1)
