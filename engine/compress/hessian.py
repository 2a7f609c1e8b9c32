"""The metric in which quantization errors count: H = X X^T of a linear's calibration inputs, made safe to invert.

The output error of a row q against w is ``(q - w) H (q - w)^T``. With U the upper factor of ``U^T U = H^-1``, going
through the inputs in order and spreading the error of each over those not yet chosen minimises it greedily, and the sum
of the squared errors over U's diagonal is exactly that output error (GPTQ, arXiv 2210.17323; Babai's nearest plane).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import ConfigError

DAMPING = 0.01
"""Added to the diagonal, as a part of its mean: GPTQ's value."""
_KEPT_FACTORS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """A damped H, and its factors as they are asked for. Encoders of several matrices with the same inputs share one.

    Make it with :meth:`of`.

    Attributes:
        matrix: fp32 [K, K], symmetric, positive definite.
    """

    matrix: Tensor
    _factors: dict[bytes, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        hessian: Tensor | Metric | None,
        in_features: int,
        *,
        device: torch.device,
        damping: float = DAMPING,
    ) -> Metric:
        """Check and damp a Hessian. None stands for the identity: all inputs equal and independent.

        An input that was never active (a zero row and column) gets the diagonal's mean, so that its weights are rounded
        as if it mattered as much as others; nothing is fed to or from it.

        Raises:
            ConfigError: a shape that is not [K, K], values that are not finite, or a matrix that is not positive
                semidefinite.
        """
        if isinstance(hessian, Metric):
            if hessian.matrix.shape[0] != in_features:
                raise ConfigError(f"a metric of {hessian.matrix.shape[0]} inputs for a weight of {in_features}")
            return hessian
        if hessian is None:
            return cls(torch.eye(in_features, device=device))
        if hessian.shape != (in_features, in_features):
            raise ConfigError(f"hessian {list(hessian.shape)}; expected [{in_features}, {in_features}]")
        full = hessian.to(device, torch.float64)
        finite = full.isfinite().all(dim=1)
        if not finite.all():
            rows = (~finite).nonzero().flatten().tolist()
            raise ConfigError(
                f"the Hessian has {len(rows)} rows with values that are not finite, the first at {rows[0]}; "
                "the calibration inputs overflowed or held NaN"
            )
        full = (full + full.T) / 2
        diagonal = full.diagonal()
        if (diagonal < 0).any():
            raise ConfigError("the Hessian has negative values on its diagonal; expected X X^T")
        active = diagonal > 0
        mean = diagonal[active].mean() if active.any() else torch.ones((), dtype=full.dtype, device=device)
        full = full + torch.diag(torch.where(active, damping * mean, mean))
        return cls((full / mean).float())  # the scale of H does not matter, fp32's range does

    def inverse_factor(self, order: Tensor | None = None) -> Tensor:
        """U, upper triangular fp32 [K, K]: ``U^T U = H^-1``, inputs in ``order`` (int64 [K]; None: as they are).

        Raises:
            ConfigError: H is not positive definite.
        """
        key = b"" if order is None else order.cpu().numpy().tobytes()
        if key not in self._factors:
            if len(self._factors) >= _KEPT_FACTORS:
                del self._factors[next(iter(self._factors))]
            self._factors[key] = _inverse_factor(self.matrix if order is None else self.matrix[order][:, order])
        return self._factors[key]


def _inverse_factor(matrix: Tensor) -> Tensor:
    # H = R R^T with R upper triangular comes from the Cholesky factor of H read backwards; then U = R^-1.
    lower, failed = torch.linalg.cholesky_ex(matrix.double().flip(0, 1))
    if failed:
        raise ConfigError(
            "the Hessian is not positive definite even with damping; expected X X^T of calibration inputs"
        )
    upper = lower.flip(0, 1)
    identity = torch.eye(len(matrix), dtype=upper.dtype, device=matrix.device)
    factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor.float()
