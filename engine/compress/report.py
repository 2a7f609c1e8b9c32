"""What became of the weights, by kind of matrix and format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.compress.hessian import Metric
from engine.compress.modules import GROUPS, Matrix
from engine.compress.packed import PackedWeight


@dataclass(slots=True)
class GroupSummary:
    """One kind of matrices ("attention", "routed experts") in one format."""

    group: str
    format: str
    num_weights: int = 0
    num_bytes: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0
    output_error: float = 0.0
    output_energy: float = 0.0

    @property
    def relative_error(self) -> float:
        """Squared error as a part of the weights' squares."""
        return self.squared_error / max(self.squared_weight, 1e-30)

    @property
    def relative_output_error(self) -> float:
        """Squared error of the outputs on the calibration inputs, as a part of the outputs' squares."""
        return self.output_error / max(self.output_energy, 1e-30)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, scales included."""
        return 8 * self.num_bytes / self.num_weights


@dataclass(slots=True)
class Report:
    """What was written. Of a layer first, then :meth:`merge` d into that of the model."""

    groups: dict[tuple[str, str], GroupSummary] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What the user should know, a sentence each."""
    num_bytes: int = 0
    """Bytes of tensor data, unquantized tensors included."""

    def add(
        self,
        matrix: Matrix,
        weight: Tensor,
        packed: PackedWeight,
        *,
        metric: Metric | None = None,
        target: Tensor | None = None,
    ) -> None:
        """Count one matrix, ``weight`` [out, in] before and ``packed`` after.

        Args:
            metric: of its inputs.
            target: what its outputs were fitted to, if not those of ``weight``.
        """
        name = packed.weight_format.name
        group = GROUPS[matrix.part]
        summary = self.groups.setdefault((group, name), GroupSummary(group, name))
        reference = weight.float()
        off = packed.dequantize().to(weight.device, torch.float32) - reference
        summary.num_weights += weight.numel()
        summary.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors.values())
        summary.squared_error += float(off.square().sum())
        summary.squared_weight += float(reference.square().sum())
        if metric is not None:
            wanted = reference if target is None else target.float()
            off = off + reference - wanted
            summary.output_error += float(((off @ metric.matrix) * off).sum())
            summary.output_energy += float(((wanted @ metric.matrix) * wanted).sum())

    def merge(self, other: Report) -> None:
        """Add what another layer's report counted."""
        for key, theirs in other.groups.items():
            mine = self.groups.setdefault(key, GroupSummary(*key))
            for name in _SUMS:
                setattr(mine, name, getattr(mine, name) + getattr(theirs, name))
        self.warnings += other.warnings

    def to_json(self) -> dict[str, Any]:
        """The counts, for :meth:`from_json`."""
        return {
            "groups": [dataclasses.asdict(summary) for summary in self.groups.values()],
            "warnings": self.warnings,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Report:
        """What :meth:`to_json` gave."""
        groups = [GroupSummary(**summary) for summary in raw["groups"]]
        return cls({(group.group, group.format): group for group in groups}, list(raw["warnings"]))


_SUMS = ("num_weights", "num_bytes", "squared_error", "squared_weight", "output_error", "output_energy")
