"""Makes a decoder while its weights stream in; an architecture overrides what is its own."""

from __future__ import annotations

import torch
from torch import Tensor

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
from engine.quantization.vocabulary import QuantizeEmbeddings, round_table
from kernels import ops
from kernels.operands import DenseWeight, Weight


class DecoderBuilder:
    """One rank's share of a dense decoder without biases, taken from `weights` module by module.

    Args:
        config: the whole model.
        weights: this rank's share.
        group: the ranks, a number that divides the model (`engine.checkpoint.partition.check_size`).
        dtype: compute dtype.
        device: compute device.
        quantize_embeddings: round token embedding and head to integers; None keeps them in `dtype`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        group: TensorParallelGroup,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantize_embeddings: QuantizeEmbeddings | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.group = group
        self.dtype = dtype
        self.device = device
        self.quantize_embeddings = quantize_embeddings
        self.num_heads, self.num_kv_heads = heads_per_rank(config, group.world_size)

    def build(self) -> Decoder:
        """The whole decoder; weights are asked for in the order in which a step uses them."""
        config = self.config
        embedding, tied_head = self.embedding()
        return Decoder(
            rotary=RotaryEmbedding(config.head_dim, config.rope_theta, self.device),
            embedding=embedding,
            layers=[self.layer(i) for i in range(config.num_hidden_layers)],
            norm=self.norm("norm"),
            head=LogitsHead(tied_head or self.head(), config.vocab_size, self.group),
        )

    def embedding(self) -> tuple[VocabParallelEmbedding, Linear | None]:
        """The token table; and the logits projection, if that is tied and can share a rounded table's memory."""
        table = self.weights.embedding()
        rows = table.shape[0]
        if self.quantize_embeddings is None:
            return VocabParallelEmbedding(table, rows, self.group), None
        rounded = round_table(table, self.quantize_embeddings)
        prepared = ops.prepare_embedding(rounded, dtype=self.dtype, device=self.device)
        embedding = VocabParallelEmbedding(prepared, rows, self.group)
        if not self.config.tie_word_embeddings:
            return embedding, None
        return embedding, self.linear(rounded) if isinstance(prepared, Tensor) else Linear.of(prepared)

    def head(self) -> Linear:
        """The logits projection."""
        weight = self.weights.head()
        if self.quantize_embeddings is not None and isinstance(weight, DenseWeight):
            weight = round_table(weight.weight, self.quantize_embeddings)
        return self.linear(weight)

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
