"""RMSNorm."""

from __future__ import annotations

from torch import Tensor

from kernels import ops


class RMSNorm:
    """RMSNorm with a learned factor, whole on every rank.

    Args:
        weight: [H].
        eps: added to the variance.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of ``x + residual``, ``x + residual``): the step into the next block."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
