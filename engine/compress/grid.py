"""The evenly spaced grid of a group of weights, ``w = (code - zero) * scale``, and the search for the best one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_REFITS = 2
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes of a format: whole numbers ``lowest`` to ``highest``; its scales are stored in ``dtype``.

    ``zero``: whether it has zero points (0 <= zero <= highest). Without, zero is code 0.
    """

    lowest: int
    highest: int
    dtype: torch.dtype
    zero: bool

    @classmethod
    def asymmetric(cls, bits: int) -> Codes:
        """0 ... 2^bits - 1, for the ``gptq`` format."""
        return cls(0, 2**bits - 1, torch.float16, zero=True)

    @classmethod
    def symmetric(cls, bits: int) -> Codes:
        """-127 ... 127 or -7 ... 7, what Paddle's encoder makes of ``wint8`` and ``wint4``."""
        largest = 2 ** (bits - 1) - 1
        return cls(-largest, largest, torch.bfloat16, zero=False)

    @property
    def shrink(self) -> tuple[float, float, int]:
        """Scales worth trying as parts of the spanning one: first, last, how many. More codes want less clipping."""
        return (0.3, 1.0, 10) if self.highest - self.lowest < 16 else (0.7, 1.0, 10)


@dataclass(frozen=True, slots=True)
class Grid:
    """A grid for each of R rows of weights.

    Attributes:
        kind: the codes.
        zeros: fp32 [R], whole numbers.
        scales: fp32 [R], as the format's dtype can hold them.
    """

    kind: Codes
    zeros: Tensor
    scales: Tensor

    @classmethod
    def of(cls, kind: Codes, zeros: Tensor, scales: Tensor) -> Grid:
        """Round both as they are stored. A grid of scale 0 has one value, 0."""
        stored = scales.clamp(0, torch.finfo(kind.dtype).max).to(kind.dtype)
        zeros = zeros.round().clamp(0, kind.highest) if kind.zero else torch.zeros_like(stored, dtype=torch.float32)
        return cls(kind, zeros, stored.float())

    @classmethod
    def spanning(cls, kind: Codes, values: Tensor) -> Grid:
        """The least grid that reaches from the least to the greatest of ``values`` [G, R], and holds 0."""
        low, high = values.amin(dim=0).clamp(max=0), values.amax(dim=0).clamp(min=0)
        if not kind.zero:
            scales = torch.maximum(-low, high) / kind.highest
            return cls.of(kind, scales, scales)
        scales = (high - low) / kind.highest
        return cls.of(kind, -low / scales.clamp(min=_TINY), scales)

    @classmethod
    def clipping(cls, kind: Codes, values: Tensor, importance: Tensor) -> Grid:
        """The least ``sum of importance * error^2`` over ``values`` [G, R], ``importance`` [G].

        For each of some scales the two zero points that center the grid best; then scales fitted by least squares to
        the codes the best one leads to. The spanning grid is among those tried.
        """
        best = cls.spanning(kind, values)
        least = best.error(values, importance)
        span, middle = best.scales, (importance @ values) / importance.sum()
        for shrink in torch.linspace(*kind.shrink, device=values.device):
            scales = span * shrink
            zero = kind.highest / 2 - middle / scales.clamp(min=_TINY)
            for rounded in (zero.floor(), zero.ceil()) if kind.zero else (zero,):
                best, least = best.or_better(cls.of(kind, rounded, scales), least, values, importance)
        for _ in range(_REFITS):
            steps = best.codes(values) - best.zeros
            weighted = importance[:, None] * steps
            scales = (weighted * values).sum(dim=0) / (weighted * steps).sum(dim=0).clamp(min=_TINY)
            best, least = best.or_better(cls.of(kind, best.zeros, scales), least, values, importance)
        return best

    def codes(self, values: Tensor) -> Tensor:
        """The nearest codes of ``values`` [..., R], whole numbers in fp32."""
        steps = (values / self.scales.clamp(min=_TINY)).round_()
        return steps.add_(self.zeros).clamp_(self.kind.lowest, self.kind.highest)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [..., R] stand for, fp32."""
        return (codes - self.zeros) * self.scales

    def error(self, values: Tensor, importance: Tensor) -> Tensor:
        """``sum of importance * (values - nearest)^2`` over dimension 0: [R]."""
        return importance @ (self.values(self.codes(values)) - values).square_()

    def or_better(self, other: Grid, least: Tensor, values: Tensor, importance: Tensor) -> tuple[Grid, Tensor]:
        """Row by row the better of this grid, whose errors are ``least``, and ``other``; and its errors."""
        errors = other.error(values, importance)
        better = errors < least
        return self.where(better, other), torch.where(better, errors, least)

    def where(self, rows: Tensor, other: Grid) -> Grid:
        """``other`` in the ``rows`` bool [R], this grid elsewhere."""
        zeros = torch.where(rows, other.zeros, self.zeros)
        return Grid(self.kind, zeros, torch.where(rows, other.scales, self.scales))
