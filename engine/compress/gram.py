"""What calibration tokens say about a matrix: in which metric its errors count, and which matrix to aim at.

Let X' be the inputs a matrix gets in the quantized model, and X those it gets in the original one. The quantized matrix
Q shall make X' into what the original W made of X: ``|W X - Q X'|^2`` is least, over all matrices, at ``T = W X X'^T
(X' X'^T)^-1``, and for any other Q it is more by ``(Q - T) H (Q - T)^T`` with ``H = X' X'^T``. So quantizing T under H
corrects, as far as a linear map can, the drift that earlier layers' errors have caused.

A matrix that writes to the residual stream can do more: what the stream itself lacks at that place, d (the original one
less the quantized one), may be added to what it shall put out. Then ``T = (W X X'^T + D X'^T) (X' X'^T)^-1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.compress.hessian import DAMPING, Metric


class Gram:
    """Sums over tokens: ``H = sum w x' x'^T``, and ``C = sum w x' x^T`` where the original inputs are known."""

    def __init__(self) -> None:
        self.tokens = 0
        """How many were added."""
        self.matrix: Tensor | None = None
        """H, fp32 [K, K] on the device of the tokens; None before the first one."""
        self.cross: Tensor | None = None
        """C, likewise; None if no original inputs were given."""
        self.lacking: Tensor | None = None
        """``sum w d x'^T``, fp32 [N, K]; None if no d was given."""
        self._factor: Tensor | None = None
        self._correction: Tensor | None = None

    def add(
        self,
        x: Tensor,
        original: Tensor | None = None,
        weights: Tensor | None = None,
        lacking: Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            x: x' [T, K].
            original: x [T, K], the same tokens in the original model.
            weights: [T], how much each counts; equally without them.
            lacking: d [T, N], what to add to the outputs.
        """
        full = x.float()
        weighted = full if weights is None else full * weights.float()[:, None]
        if self.matrix is None:
            self.matrix = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self.matrix.addmm_(weighted.T, full)
        if original is not None:
            if self.cross is None:
                self.cross = torch.zeros_like(self.matrix)
            self.cross.addmm_(weighted.T, original.float())
        if lacking is not None:
            if self.lacking is None:
                self.lacking = torch.zeros(lacking.shape[1], x.shape[1], device=x.device)
            self.lacking.addmm_(lacking.float().T, weighted)
        self.tokens += len(x)

    def metric(self, in_features: int, *, device: torch.device) -> Metric:
        """H, damped. Raises ConfigError where an activation was not finite."""
        return Metric.of(self.matrix, in_features, device=device)

    def target(self, weight: Tensor) -> Tensor:
        """T, fp32 [N, K], for W ``weight`` [N, K]; W itself if the original inputs are not known."""
        if self.matrix is None or self.cross is None:
            return weight.float()
        if self._correction is None:
            # T = W + W (C - H)^T H^-1 + ..., damped towards W where the tokens say little.
            self._correction = self._solve(self.cross.double() - self.matrix.double())  # [K, K]
        full = weight.float()
        target = full + full @ self._correction.T
        return target if self.lacking is None else target + self._solve(self.lacking.T.double()).T

    def _solve(self, right: Tensor) -> Tensor:
        """``H^-1 right``, fp64 [K, M] -> fp32 [K, M], H being damped as a metric is."""
        if self.matrix is None:
            raise ValueError("no tokens were added")
        if self._factor is None:
            h = self.matrix.double()
            diagonal = h.diagonal()
            active = diagonal > 0
            mean = diagonal[active].mean() if active.any() else torch.ones((), dtype=h.dtype, device=h.device)
            self._factor = torch.linalg.cholesky(h + torch.diag(torch.where(active, DAMPING * mean, mean)))
        return torch.cholesky_solve(right, self._factor).float()


def total(grams: list[Gram]) -> Gram:
    """The sums over the tokens of all of ``grams``."""
    result = Gram()
    for gram in grams:
        result.tokens += gram.tokens
        if gram.matrix is not None:
            result.matrix = gram.matrix.clone() if result.matrix is None else result.matrix.add_(gram.matrix)
        if gram.cross is not None:
            result.cross = gram.cross.clone() if result.cross is None else result.cross.add_(gram.cross)
        if gram.lacking is not None:
            result.lacking = gram.lacking.clone() if result.lacking is None else result.lacking.add_(gram.lacking)
    return result


def blended(gram: Gram, others: Gram, *, needed: int) -> Gram:
    """The sums of an expert, leaning on those of ``others`` as far as it saw fewer than ``needed`` tokens.

    ``a S / trace(H) + (1 - a) S' / trace(H')`` with ``a = tokens / needed``, for H and C alike.
    """
    if gram.tokens >= needed or others.matrix is None:
        return gram
    if gram.matrix is None:
        return others
    result = Gram()
    result.tokens = gram.tokens
    own, common = blend_weights(gram.matrix, others.matrix, tokens=gram.tokens, needed=needed)
    result.matrix = own * gram.matrix + common * others.matrix
    if gram.cross is not None and others.cross is not None:
        result.cross = own * gram.cross + common * others.cross
    if gram.lacking is not None and others.lacking is not None:
        result.lacking = own * gram.lacking + common * others.lacking
    return result


def blend_weights(hessian: Tensor, towards: Tensor, *, tokens: float, needed: float) -> tuple[Tensor, Tensor]:
    """Factors of a Hessian of too few tokens and of one known better: both to the same trace, then by tokens."""
    a = min(1.0, tokens / needed)
    tiny = torch.finfo(torch.float32).tiny
    own = hessian.shape[0] / hessian.diagonal().sum().clamp(min=tiny)
    common = hessian.shape[0] / towards.diagonal().sum().clamp(min=tiny)
    return a * own, (1 - a) * common
