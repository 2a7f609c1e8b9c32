"""Rotary position embedding over interleaved pairs (2i, 2i + 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """cos and sin of position x frequency, [T, D/2, 2] in fp32."""
    angles = positions.float().unsqueeze(-1) * inv_freq  # [T, D/2]
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate [T, heads, D]."""
    cos, sin = table.unsqueeze(1).unbind(-1)  # [T, 1, D/2] each
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
