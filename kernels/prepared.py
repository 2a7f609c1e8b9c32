"""Weights as a device wants them: what `ops.prepare` makes once, at load, of a `kernels.operands.Weight`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DensePrepared:
    """A matrix, or a stack of experts' matrices, decoded to the compute dtype.

    Attributes:
        weight: [N, K] or [E, N, K].
        experts: the E matrices [N, K] of a stack, as views taken once (a view costs as much as a small product);
            empty for a single matrix.
    """

    weight: Tensor
    experts: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight: Tensor) -> DensePrepared:
        """Wrap `weight` [N, K] or [E, N, K]."""
        return cls(weight, weight.unbind(0) if weight.dim() == 3 else ())

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[-2]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[-1]


Prepared = DensePrepared
