"""Choosing a group again when all others are chosen: what remains after a pass with error feedback.

The pass chose each group knowing the errors before it, not those after. With all others as they are, the error is again
a quadratic of the group's own weights, so the same encoder runs on the group alone; a row takes the result where it is
better, so that the error never grows. (Coordinate descent as in QuantEase, arXiv 2309.01885, and CDQuant,
arXiv 2406.17542, by groups.) Neither GPTQ nor BPDQ does this as published.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Remainder:
    """One group's part of the error: ``(off - aim) H_gg (off - aim)^T`` and a constant, by row.

    Attributes:
        aim: fp32 [G, R], by how much the group should be off, to make up for the errors of all others.
        matrix: H of the group, fp32 [G, G].
        factor: U of it, upper triangular, ``U^T U = H_gg^-1``.
    """

    aim: Tensor
    matrix: Tensor
    factor: Tensor

    @classmethod
    def of(cls, off: Tensor, matrix: Tensor, group: slice) -> Remainder:
        """The group's in a matrix that is ``off`` [K, R] (Q - W) under H = ``matrix`` [K, K]."""
        own = matrix[group, group]
        pull = matrix[group] @ off - own @ off[group]
        # U from the Cholesky factor of H read backwards, as for the whole (engine.compress.hessian).
        upper = torch.linalg.cholesky(own.double().flip(0, 1)).flip(0, 1)
        identity = torch.eye(len(own), dtype=torch.float64, device=own.device)
        factor = torch.linalg.solve_triangular(upper, identity, upper=True)
        aim = -(factor.T @ (factor @ pull.double())).float()
        return cls(aim, own, factor.float())

    def better(self, new: Tensor, old: Tensor) -> Tensor:
        """In which rows being off by ``new`` [G, R] is better than by ``old``: bool [R]."""
        return self._error(new) < self._error(old)

    def _error(self, off: Tensor) -> Tensor:
        left = off - self.aim
        return (left * (self.matrix @ left)).sum(dim=0)
