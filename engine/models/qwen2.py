"""Qwen2 (and Qwen2.5, the same architecture; arXiv 2407.10671): dense layers, biases on queries, keys and values."""

from __future__ import annotations

from engine.errors import CheckpointError
from engine.layers.linear import Linear
from engine.models.builder import DecoderBuilder


class Qwen2(DecoderBuilder):
    """Qwen2ForCausalLM."""

    def qkv(self, layer: int) -> Linear:
        """The joint projection with its bias.

        Raises:
            CheckpointError: the checkpoint has no bias for it.
        """
        weight, bias = self.weights.qkv(layer), self.weights.qkv_bias(layer)
        if bias is None:
            raise CheckpointError(
                f"the checkpoint has no biases for the queries, keys and values of layer {layer}; "
                "Qwen2ForCausalLM has them in every layer, so tensors are missing or the architecture is another one"
            )
        return Linear(weight, bias, dtype=self.dtype, device=self.device)
