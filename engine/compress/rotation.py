"""Another basis for the residual stream: the same function, other weights, the same format.

RMSNorm does not see an orthogonal change of basis once its weight is folded into what reads it (SliceGPT, arXiv
2401.15024; QuaRot, arXiv 2404.00456). So with R orthogonal, the embedding becomes E R, every reader of the stream W
becomes (W diag(norm)) R, every writer R^T W, and nothing is left to do at run time. Features that stand out are spread
over all of them. The inputs of down_proj and o_proj are not in the stream and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.compress.layer import unquantized
from engine.config import ModelConfig
from engine.errors import UnsupportedError
from engine.layers.weights import WeightSource
from kernels.operands import DenseWeight, Weight


def orthogonal(size: int, *, seed: int, device: torch.device) -> Tensor:
    """A random orthogonal matrix, fp32 [size, size], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    fixed: Tensor = q * r.diagonal().sign()
    return fixed.float().to(device)


class RotatedWeights:
    """Unquantized weights in another basis of the residual stream; a `WeightSource` on top of another.

    All norm weights come out as ones. Computed in fp32, returned in the dtype of the source.

    Args:
        source: unquantized weights, of one rank.
        config: the model.
        rotation: R, fp32 [H, H], orthogonal.

    Raises:
        UnsupportedError: the head is the embedding, which can't have the last norm folded in and stay the same.
    """

    def __init__(self, source: WeightSource, config: ModelConfig, rotation: Tensor) -> None:
        if config.tie_word_embeddings:
            raise UnsupportedError(
                "the residual stream of a model with tie_word_embeddings can't be rotated: the last norm is folded "
                "into the head, which is the embedding"
            )
        self._source = source
        self._rotation = rotation

    def embedding(self) -> Tensor:
        """[V, H]."""
        table = self._source.embedding()
        return (table.float() @ self._rotation).to(table.dtype)

    def head(self) -> Weight:
        """(H, V)."""
        return self._reader(self._source.head(), "norm")

    def norm(self, name: str) -> Tensor:
        """[H], ones."""
        return torch.ones_like(self._source.norm(name))

    def qkv(self, layer: int) -> Weight:
        """(H, (heads + 2 kv_heads) D)."""
        return self._reader(self._source.qkv(layer), f"layers.{layer}.input_layernorm")

    def qkv_bias(self, layer: int) -> Tensor | None:
        """As it is."""
        return self._source.qkv_bias(layer)

    def attention_output(self, layer: int) -> Weight:
        """(heads D, H)."""
        return self._writer(self._source.attention_output(layer))

    def gate_up(self, layer: int, *, shared: bool = False) -> Weight:
        """(H, 2I)."""
        return self._reader(self._source.gate_up(layer, shared=shared), f"layers.{layer}.post_attention_layernorm")

    def down(self, layer: int, *, shared: bool = False) -> Weight:
        """(I, H)."""
        return self._writer(self._source.down(layer, shared=shared))

    def router(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Gate fp32 [E, H]; the correction bias as it is."""
        gate, bias = self._source.router(layer)
        return self._read(gate, f"layers.{layer}.post_attention_layernorm"), bias

    def expert_gate_up(self, layer: int) -> Weight:
        """(E, H, 2I)."""
        return self._reader(self._source.expert_gate_up(layer), f"layers.{layer}.post_attention_layernorm")

    def expert_down(self, layer: int) -> Weight:
        """(E, I, H)."""
        return self._writer(self._source.expert_down(layer))

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def _reader(self, weight: Weight, norm: str) -> DenseWeight:
        return DenseWeight(self._read(unquantized(weight), norm))

    def _read(self, weight: Tensor, norm: str) -> Tensor:
        scale = self._source.norm(norm).float()
        return _each(weight, lambda one: (one.float() * scale) @ self._rotation)  # [..., N, H]

    def _writer(self, weight: Weight) -> DenseWeight:
        return DenseWeight(_each(unquantized(weight), lambda one: self._rotation.T @ one.float()))  # [..., H, K]


def _each(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change one matrix after the other, so that the fp32 copy in flight is one expert's."""
    if weight.dim() == 2:
        return change(weight).to(weight.dtype)
    changed = torch.empty_like(weight)
    for expert in range(len(weight)):
        changed[expert] = change(weight[expert])
    return changed
