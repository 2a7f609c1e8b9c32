"""ERNIE-4.5: a pre-norm decoder with dense or mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.execution.parallel import TensorParallelGroup
from engine.layers.attention import Attention, AttentionInputs, heads_per_rank
from engine.layers.embedding import LogitsHead, VocabParallelEmbedding
from engine.layers.linear import GatedMLP, Linear
from engine.layers.moe import SparseMoE
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.layers.weights import WeightSource
from kernels import ops
from kernels.operands import Weight


class DecoderLayer:
    """Attention and feed-forward, each with one sum over the ranks."""

    def __init__(
        self,
        *,
        input_norm: RMSNorm,
        attention: Attention,
        post_attention_norm: RMSNorm,
        mlp: GatedMLP | SparseMoE,
        group: TensorParallelGroup,
    ) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.post_attention_norm = post_attention_norm
        self.mlp = mlp
        self.group = group

    def __call__(
        self, x: Tensor, residual: Tensor | None, kv_cache: tuple[Tensor, Tensor], inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor]:
        """(output of the layer before, residual stream without it) -> the same for this layer; [T, H] each.

        In the first layer `x` is the embedding and `residual` None. The sum is left to the next norm, which fuses it.
        """
        hidden, residual = (self.input_norm(x), x) if residual is None else self.input_norm.add(x, residual)
        hidden = self.group.all_reduce(self.attention(hidden, kv_cache, inputs))
        hidden, residual = self.post_attention_norm.add(hidden, residual)
        return self.group.all_reduce(self.mlp(hidden)), residual


class Ernie4_5:
    """Ernie4_5ForCausalLM and Ernie4_5_MoeForCausalLM: one rank's share, taken from `weights` module by module.

    Args:
        config: the whole model.
        weights: this rank's share.
        group: the ranks, a number that divides the model (`engine.checkpoint.partition.check_size`).
        dtype: compute dtype.
        device: compute device.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        group: TensorParallelGroup,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        build = _Builder(config, weights, group, dtype, device)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, device)
        self.embedding = VocabParallelEmbedding(weights.embedding(), group)
        self.layers = [build.layer(i) for i in range(config.num_hidden_layers)]
        self.norm = build.norm("norm")
        self.head = LogitsHead(build.linear(weights.head()), config.vocab_size, group)

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        *,
        slot_mapping: Tensor,
        metadata: ops.AttentionMetadata,
        logits_rows: Tensor,
    ) -> Tensor | None:
        """Run a flat batch; see `engine.models.DecoderModel`."""
        inputs = AttentionInputs(self.rotary.table(positions), slot_mapping, metadata)
        x, residual = self.embedding(token_ids), None  # [T, H]
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, kv_cache, inputs)
        x = x.index_select(0, logits_rows)  # only these rows' norm and logits are wanted: [S, H]
        if residual is not None:
            x = x + residual.index_select(0, logits_rows)
        return self.head(self.norm(x))


class _Builder:
    """Makes layers while the weights stream in."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        group: TensorParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.weights = weights
        self.group = group
        self.dtype = dtype
        self.device = device
        self.num_heads, self.num_kv_heads = heads_per_rank(config, group.world_size)

    def linear(self, weight: Weight) -> Linear:
        return Linear(weight, dtype=self.dtype, device=self.device)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.weights.norm(name), self.config.rms_norm_eps)

    def mlp(self, layer: int, *, shared: bool = False) -> GatedMLP:
        gate_up = self.linear(self.weights.gate_up(layer, shared=shared))
        return GatedMLP(gate_up, self.linear(self.weights.down(layer, shared=shared)))

    def feed_forward(self, layer: int) -> GatedMLP | SparseMoE:
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

    def layer(self, layer: int) -> DecoderLayer:
        attention = Attention(
            self.linear(self.weights.qkv(layer)),
            self.linear(self.weights.attention_output(layer)),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.config.head_dim,
        )
        return DecoderLayer(
            input_norm=self.norm(f"layers.{layer}.input_layernorm"),
            attention=attention,
            post_attention_norm=self.norm(f"layers.{layer}.post_attention_layernorm"),
            mlp=self.feed_forward(layer),
            group=self.group,
        )
