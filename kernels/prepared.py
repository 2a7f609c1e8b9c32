"""Weights as a device wants them: what `ops.prepare` makes once, at load, of a `kernels.operands.Weight`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Prepared(Protocol):
    """A matrix, or a stack of experts' matrices, in a layout of the backend that made it, and that alone can use it."""

    @property
    def out_features(self) -> int:
        """N."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""


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

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.weight.numel() * self.weight.element_size()


def dense(weight: Prepared) -> DensePrepared:
    """The decoded matrix that a backend for dense weights made. Raises TypeError for another backend's."""
    if not isinstance(weight, DensePrepared):
        raise TypeError(f"{type(weight).__name__} was prepared for another device; see kernels.ops.prepare")
    return weight
