"""One group of BPDQ: bits chosen with error feedback, and coefficients fitted to bits, for R rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-4
"""BPDQ's: keeps the fit solvable where a plane is the same for a whole group."""
_START_BITS = 8
"""The first planes are the top bits of a rounding to so many (BPDQ)."""
_TINY = torch.finfo(torch.float32).tiny


class Solution(NamedTuple):
    """One group in bit planes.

    ``bits`` fp32 [G, k, R]; ``coefficients`` fp32 [k+1, R] as bf16 holds them, c0 last; ``errors`` fp32 [G, R] in units
    of what they cost: their squares add up to the output error.
    """

    bits: Tensor
    coefficients: Tensor
    errors: Tensor

    def values(self) -> Tensor:
        """What bits and coefficients stand for: fp32 [G, R]."""
        return (self.bits * self.coefficients[:-1]).sum(dim=1) + self.coefficients[-1]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The G inputs of a group in R rows, and the metric in which their errors count.

    Attributes:
        target: fp32 [G, R], the weights as earlier groups' errors left them.
        given: fp32 bits [G, f, R] of planes that are chosen already; f may be 0.
        unit: U of these inputs, transposed, each column of it divided by U[t,t]: fp32 [G, G]. With it the innermost
            loop need not divide its errors.
        whitener: (U^-1)^T, takes errors [G, R] into what they cost.
        goal: the whitened target.
        ones: the whitened 1 ... 1, [G].
    """

    target: Tensor
    given: Tensor
    unit: Tensor
    whitener: Tensor
    goal: Tensor
    ones: Tensor

    @classmethod
    def of(cls, target: Tensor, factor: Tensor, given: Tensor) -> Group:
        """``factor``: U of these inputs, fp32 [G, G], upper triangular."""
        identity = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor.double(), identity, upper=True)
        whitener = inverse.T.float().contiguous()
        unit = (factor / factor.diagonal()[:, None]).T.contiguous()
        return cls(target, given, unit, whitener, goal=whitener @ target, ones=inverse.sum(dim=0).float())

    def of_rows(self, rows: Tensor) -> Group:
        """Only some of the rows, int64 [R']."""
        return replace(self, target=self.target[:, rows], given=self.given[..., rows], goal=self.goal[:, rows])

    def solve(self, planes: int, *, iterations: int) -> Solution:
        """Choose the planes not given, and coefficients for all of them.

        A row whose bits an iteration leaves as they were is finished: all later ones would. Most are after three.
        """
        free = planes - self.given.shape[1]
        codes = best = self._first_codes(free)
        coefficients, errors = self.fit(self._with_given(codes, free))
        least = errors.square().sum(dim=0)
        group, rows = self, torch.arange(codes.shape[1], device=codes.device)
        for _ in range(iterations):
            before, codes = codes, group._choose(coefficients, free)
            moved = (codes != before).any(dim=0).nonzero().flatten()
            if not len(moved):
                break
            group, rows, codes = group.of_rows(moved), rows[moved], codes[:, moved]
            coefficients, errors = group.fit(group._with_given(codes, free))
            score = errors.square_().sum(dim=0)
            better = score < least[rows]
            least[rows[better]] = score[better]
            best = best.index_copy(1, rows[better], codes[:, better])
        bits = self._with_given(best, free)
        return Solution(bits, *self.fit(bits))

    def fit(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """For bits fp32 [G, k, R] the coefficients [k+1, R] of least error, and the errors [G, R], see Solution.

        Row by row the C of least ``|goal - C (planes, ones)|^2 + ridge |C|^2`` in the metric, rounded as it is stored.
        """
        basis = (self.whitener @ bits.flatten(1)).view(bits.shape)
        planes = basis.unbind(dim=1)
        k, width = len(planes), bits.shape[2]
        gram = torch.empty((k + 1, k + 1, width), dtype=torch.float64, device=bits.device)
        right = torch.empty((k + 1, width), dtype=torch.float64, device=bits.device)
        for i in range(k):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = (planes[i] * planes[j]).sum(dim=0)
            gram[k, i] = gram[i, k] = self.ones @ planes[i]
            right[i] = (planes[i] * self.goal).sum(dim=0)
        gram[k, k], right[k] = self.ones @ self.ones, self.ones @ self.goal
        gram.diagonal().add_(_RIDGE)
        coefficients = _solve(gram, right).bfloat16().float()
        errors = torch.addcmul(self.goal, self.ones[:, None], coefficients[k], value=-1)
        for i in range(k):
            errors.addcmul_(planes[i], coefficients[i], value=-1)
        return coefficients, errors

    def levels(self, coefficients: Tensor, free: int) -> Tensor:
        """What each code of the free planes adds to the given ones: [2^free, R]."""
        every = torch.arange(2**free, device=coefficients.device, dtype=torch.uint8)[:, None]
        levels: Tensor = (bits_of(every, free) * coefficients[-1 - free : -1]).sum(dim=1) + coefficients[-1]
        return levels

    def _first_codes(self, free: int) -> Tensor:
        """The top bits of the weights, less what given planes explain, rounded to 8 bits: uint8 [G, R]."""
        values = self.target
        if self.given.shape[1]:
            values = self._without_given(self.fit(self.given)[0])
        low = values.amin(dim=0)
        step = (values.amax(dim=0) - low) / (2**_START_BITS - 1)
        steps = ((values - low) / step.clamp(min=_TINY)).round_().clamp_(max=2**_START_BITS - 1)
        codes: Tensor = steps.to(torch.uint8) >> (_START_BITS - free)
        return codes

    def _choose(self, coefficients: Tensor, free: int) -> Tensor:
        """Input by input the nearest level, errors fed forward inside the group: uint8 [G, R], bit i is plane i."""
        levels, code_of = self.levels(coefficients, free).sort(dim=0)
        middles = ((levels[1:] + levels[:-1]) / 2).T.contiguous()  # [R, 2^free - 1]
        target = self._without_given(coefficients)
        errors, index = torch.empty_like(target), torch.empty_like(target, dtype=torch.int64)
        for t, (error, place) in enumerate(zip(errors, index, strict=True)):
            torch.addmv(target[t], errors[:t].T, self.unit[t, :t], alpha=-1, out=error)
            torch.searchsorted(middles, error[:, None], out=place[:, None])
            error.sub_(levels.gather(0, place[None])[0])
        return code_of.gather(0, index).to(torch.uint8)

    def _with_given(self, codes: Tensor, free: int) -> Tensor:
        """Bits of all planes [G, k, R]."""
        bits = bits_of(codes, free)
        return torch.cat((self.given, bits), dim=1) if self.given.shape[1] else bits

    def _without_given(self, coefficients: Tensor) -> Tensor:
        """The target less what given planes add: [G, R]."""
        given = self.given.shape[1]
        return self.target - (self.given * coefficients[:given]).sum(dim=1) if given else self.target


def bits_of(codes: Tensor, count: int) -> Tensor:
    """uint8 [G, R] -> fp32 [G, count, R]: bit i of each."""
    shifts = torch.arange(count, dtype=torch.uint8, device=codes.device)[:, None]
    return ((codes[:, None] >> shifts) & 1).float()


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """x of ``matrix x = right`` for R small positive definite matrices [m, m, R], right [m, R]; both are used up.

    Gaussian elimination with the R systems side by side: LAPACK would be called R times.
    """
    size = len(matrix)
    for i in range(size):
        for j in range(i + 1, size):
            ratio = matrix[j, i] / matrix[i, i]
            matrix[j, i:] -= ratio * matrix[i, i:]
            right[j] -= ratio * right[i]
    for i in reversed(range(size)):
        right[i] /= matrix[i, i]
        right[:i] -= matrix[:i, i] * right[i]
    return right
