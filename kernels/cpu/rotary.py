"""Rotary position embedding as one complex product."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """cos + i sin, complex64 [T, 1, D/2]; see `ops.rotary_table`."""
    angles = positions.unsqueeze(-1) * inv_freq  # [T, D/2]
    return torch.complex(angles.cos(), angles.sin()).unsqueeze(1)


def rotary(x: Tensor, table: Tensor, *, interleaved: bool) -> Tensor:
    """A pair is a complex number, which the table turns; see `ops.rotary`."""
    if interleaved:
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))  # [T, heads, D/2], no copy
        return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
    turned = torch.complex(*x.float().chunk(2, dim=-1)) * table  # [T, heads, D/2]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
