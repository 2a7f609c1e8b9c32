"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import ops


class RotaryEmbedding:
    """Angles of a rotary embedding over the whole head, in fp32.

    Args:
        head_dim: D, even.
        theta: base of the frequencies ``theta ** (-2i / D)``.
        device: where positions are.
    """

    def __init__(self, head_dim: int, theta: float, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self.inv_freq = 1.0 / theta**exponents  # [D/2]

    def table(self, positions: Tensor) -> Tensor:
        """Angles of int [T] positions for `ops.rotary`, shared by all layers of a step."""
        return ops.rotary_table(positions, self.inv_freq)
