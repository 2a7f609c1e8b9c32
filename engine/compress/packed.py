"""What an encoder returns: one matrix in the tensors of its format."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.quantization.format import WeightFormat


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized linear, [out, in] to the outside, in a checkpoint's tensors (Paddle's orientation) inside."""

    weight_format: WeightFormat
    shape: tuple[int, int]
    """[out, in]."""
    tensors: dict[str, Tensor]
    """By suffix, as they go into the file."""

    def dequantize(self) -> Tensor:
        """bf16 [out, in], exactly what a server computes with."""
        return self.weight_format.dequantize(self.tensors).T

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, scales included."""
        out_features, in_features = self.shape
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors.values()) / (out_features * in_features)


def relative_error(weight: Tensor, packed: PackedWeight) -> float:
    """Squared error of ``packed`` against ``weight`` [out, in], as a part of the weight's own squares."""
    reference = weight.float()
    error = (packed.dequantize().float() - reference).square().sum()
    return float(error / reference.square().sum().clamp(min=1e-30))
