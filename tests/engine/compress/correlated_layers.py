"""Linear layers with correlated inputs, on which encoders can be told apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compress.hessian import Metric
from engine.compress.packed import PackedWeight
from engine.quantization.format import Span, WeightFormat
from kernels.reference.dequantize import dequantize


@dataclass(frozen=True, slots=True)
class Layer:
    """``weight`` [out, in] Gaussian; ``hessian`` [in, in] of inputs whose spectrum falls as 1/i, some of them heavy."""

    weight: Tensor
    hessian: Tensor

    @property
    def metric(self) -> Metric:
        """The damped Hessian, as encoders see it."""
        return Metric.of(self.hessian, self.weight.shape[1], device=self.weight.device)


def correlated_layer(out_features: int, in_features: int, *, seed: int, heavy: int = 4) -> Layer:
    """A random layer; ``heavy`` of its inputs are eight times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, in_features + 1) ** -0.5
    rotation = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator))[0]
    inputs = (torch.randn(4 * in_features, in_features, generator=generator) * spectrum) @ rotation.T
    inputs[:, torch.randperm(in_features, generator=generator)[:heavy]] *= 8
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    return Layer(weight, inputs.T @ inputs)


def exact(packed: PackedWeight, weight_format: WeightFormat | None = None) -> Tensor:
    """What the packed bytes mean in fp32 [out, in], without the rounding to bf16 that a served weight gets."""
    n, k = packed.shape
    chosen = weight_format or packed.weight_format
    return dequantize(chosen.load(packed.tensors, rows=Span(0, k), columns=[Span(0, n)]), torch.float32)


def squared_error(weight: Tensor, decoded: Tensor, metric: Metric) -> float:
    """tr((Q - W) H (Q - W)^T)."""
    off = decoded.double() - weight.double()
    return float(((off @ metric.matrix.double()) * off).sum())
