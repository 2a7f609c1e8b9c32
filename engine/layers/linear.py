"""Matrix products cut over the ranks of a tensor-parallel group (Megatron-LM, arXiv 1909.08053)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import ops
from kernels.operands import Weight


class Linear:
    """``x W^T + bias`` with a rank's share of W.

    Cut by output features (columns in Paddle's view), the result is this rank's features. Cut by input features, it
    is a partial sum, which the caller reduces once for everything that is added to it.

    Args:
        weight: (K, N).
        bias: [N] in `dtype` on `device`: this rank's features. None for a weight cut by input features, where each rank
            would add it.
        dtype: compute dtype.
        device: compute device.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None, *, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = ops.prepare(weight, dtype=dtype, device=device)
        self.bias = bias

    @classmethod
    def of(cls, weight: ops.Prepared) -> Linear:
        """With a weight that is prepared already, and shared with something else; without a bias."""
        linear = cls.__new__(cls)
        linear.weight, linear.bias = weight, None
        return linear

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return ops.linear(x, self.weight, self.bias)


class GatedMLP:
    """SwiGLU: ``down(silu(gate x) * up x)``, gate and up cut by output, down by input features."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H], a partial sum."""
        return self.down(ops.silu_and_mul(self.gate_up(x)))
