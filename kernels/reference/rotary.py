"""Rotary position embedding over pairs of features that stand side by side or half a head apart."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """cos and sin of position x frequency, [T, D/2, 2] in fp32."""
    angles = positions.float().unsqueeze(-1) * inv_freq  # [T, D/2]
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotary(x: Tensor, table: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate [T, heads, D]."""
    cos, sin = table.unsqueeze(1).unbind(-1)  # [T, 1, D/2] each
    pair = -1 if interleaved else -2  # where the two of a pair stand: [T, heads, D/2, 2] or [T, heads, 2, D/2]
    a, b = x.float().reshape(*x.shape[:-1], *((-1, 2) if interleaved else (2, -1))).unbind(pair)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=pair).flatten(-2).to(x.dtype)
