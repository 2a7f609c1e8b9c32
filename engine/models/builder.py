"""Makes a decoder while its weights stream in; an architecture overrides what is its own."""

from __future__ import annotations

import torch

from engine.config import ModelConfig
from engine.execution.parallel import TensorParallelGroup
from engine.layers.attention import Attention, heads_per_rank
from engine.layers.embedding import LogitsHead, VocabParallelEmbedding
from engine.layers.linear import GatedMLP, Linear
from engine.layers.moe import SparseMoE
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.layers.weights import WeightSource
from engine.models.decoder import Decoder, DecoderLayer
from kernels.operands import Weight


class DecoderBuilder:
    """One rank's share of a dense decoder without biases, taken from `weights` module by module.

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
        self.config = config
        self.weights = weights
        self.group = group
        self.dtype = dtype
        self.device = device
        self.num_heads, self.num_kv_heads = heads_per_rank(config, group.world_size)

    def build(self) -> Decoder:
        """The whole decoder; weights are asked for in the order in which a step uses them."""
        config = self.config
        return Decoder(
            rotary=RotaryEmbedding(config.head_dim, config.rope_theta, self.device),
            embedding=VocabParallelEmbedding(self.weights.embedding(), self.group),
            layers=[self.layer(i) for i in range(config.num_hidden_layers)],
            norm=self.norm("norm"),
            head=LogitsHead(self.linear(self.weights.head()), config.vocab_size, self.group),
        )

    def layer(self, layer: int) -> DecoderLayer:
        """Decoder layer `layer`, from 0."""
        return DecoderLayer(
            input_norm=self.norm(f"layers.{layer}.input_layernorm"),
            attention=self.attention(layer),
            post_attention_norm=self.norm(f"layers.{layer}.post_attention_layernorm"),
            mlp=self.feed_forward(layer),
            group=self.group,
        )

    def attention(self, layer: int) -> Attention:
        """Self-attention of a layer."""
        return Attention(
            self.qkv(layer),
            self.linear(self.weights.attention_output(layer)),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.config.head_dim,
            rope_interleaved=self.config.rope_interleaved,
        )

    def qkv(self, layer: int) -> Linear:
        """The joint projection to queries, keys and values."""
        return self.linear(self.weights.qkv(layer))

    def feed_forward(self, layer: int) -> GatedMLP | SparseMoE:
        """What follows attention in a layer."""
        return self.mlp(layer)

    def mlp(self, layer: int, *, shared: bool = False) -> GatedMLP:
        """The layer's dense MLP, or its shared experts as one."""
        gate_up = self.linear(self.weights.gate_up(layer, shared=shared))
        return GatedMLP(gate_up, self.linear(self.weights.down(layer, shared=shared)))

    def linear(self, weight: Weight) -> Linear:
        """A projection without a bias."""
        return Linear(weight, dtype=self.dtype, device=self.device)

    def norm(self, name: str) -> RMSNorm:
        """The norm that `WeightSource.norm` has under this name."""
        return RMSNorm(self.weights.norm(name), self.config.rms_norm_eps)
