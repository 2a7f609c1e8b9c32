"""ERNIE-4.5: dense or mixture-of-experts layers."""

from __future__ import annotations

from engine.layers.linear import GatedMLP
from engine.layers.moe import SparseMoE
from engine.models.builder import DecoderBuilder


class Ernie4_5(DecoderBuilder):
    """Ernie4_5ForCausalLM and Ernie4_5_MoeForCausalLM; a dense model is one without mixture-of-experts layers."""

    def feed_forward(self, layer: int) -> GatedMLP | SparseMoE:
        """Routed experts, with shared ones beside them if the model has any, or a dense MLP."""
        moe = self.config.moe
        if moe is None or not moe.is_moe_layer(layer):
            return self.mlp(layer)
        gate, bias = self.weights.router(layer)
        return SparseMoE(
            gate,
            bias,
            gate_up=self.weights.expert_gate_up(layer),
            down=self.weights.expert_down(layer),
            shared=self.mlp(layer, shared=True) if moe.num_shared_experts else None,
            top_k=moe.num_experts_per_token,
            norm_min=moe.norm_min,
            dtype=self.dtype,
            device=self.device,
        )
