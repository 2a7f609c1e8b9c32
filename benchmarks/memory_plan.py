"""Bytes of a model by part, from its shapes and formats alone, and what a decode step must read of them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from engine.config import ModelConfig
from engine.quantization.bf16 import Bf16
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import WeightFormat
from kernels.cache import token_bytes

ITEM_BYTES = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4}
"""By safetensors' names."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes on one GPU.

    Attributes:
        parts: of the weights, by part and format.
        experts: of those, the routed experts.
        unread: of those, the embedding table, of which a step reads only a few rows.
        token: of the KV cache, for a token.
        model: whose.
    """

    parts: dict[str, int]
    experts: int
    unread: int
    token: int
    model: ModelConfig

    @property
    def weights(self) -> int:
        """All weights."""
        return sum(self.parts.values())

    def read(self, batch: int, context: int) -> float:
        """Bytes that a decode step must read, if each token chooses its experts evenly and by itself."""
        moe = self.model.moe
        touched = 1 - (1 - moe.num_experts_per_token / moe.num_experts) ** batch if moe else 0.0
        dense = self.weights - self.experts - self.unread
        return dense + touched * self.experts + batch * context * self.token


def plan(model: ModelConfig, formats: QuantizationConfig, *, head: WeightFormat, kv_dtype: torch.dtype) -> Plan:
    """The bytes of `model` in `formats` on one GPU; the logits' projection in `head` unless it is the embedding."""
    hidden, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    parts: dict[str, int] = defaultdict(int)
    table = model.vocab_size * hidden * 2
    parts["embedding, bf16"] = table
    if not model.tie_word_embeddings:
        parts[f"head, {head.name}"] = matrix_bytes(head, hidden, model.vocab_size)
    parts["norms, bf16"] = (2 * model.num_hidden_layers + 1) * hidden * 2
    experts = 0
    for layer in range(model.num_hidden_layers):
        attention = formats.format("attention", layer)
        qkv = matrix_bytes(attention, hidden, (heads + 2 * kv_heads) * model.head_dim)
        output = matrix_bytes(attention, heads * model.head_dim, hidden)
        parts[f"attention, {attention.name}"] += qkv + output
        moe = model.moe
        if moe is None or not moe.is_moe_layer(layer):
            dense = formats.format("mlp", layer)
            parts[f"dense layers, {dense.name}"] += _mlp(dense, hidden, model.intermediate_size)
            continue
        parts["router, fp32"] += (hidden + 1) * moe.num_experts * 4
        routed = formats.format("experts", layer)
        size = moe.num_experts * _mlp(routed, hidden, moe.intermediate_size)
        parts[f"experts, {routed.name}"] += size
        experts += size
        if moe.num_shared_experts:
            shared = formats.format("shared_experts", layer)
            parts[f"shared experts, {shared.name}"] += _mlp(shared, hidden, moe.shared_intermediate_size)
    return Plan(
        parts=dict(parts),
        experts=experts,
        unread=0 if model.tie_word_embeddings else table,
        token=model.num_hidden_layers * token_bytes(kv_heads, model.head_dim, kv_dtype),
        model=model,
    )


def matrix_bytes(weight_format: WeightFormat, k: int, n: int) -> int:
    """Bytes of a [K, N] matrix, as its format stores it."""
    if isinstance(weight_format, Bf16):
        return 2 * k * n
    specs = weight_format.tensors(k, n).values()
    return sum(math.prod(spec.shape) * ITEM_BYTES[spec.dtypes[0]] for spec in specs)


def _mlp(weight_format: WeightFormat, hidden: int, width: int) -> int:
    return matrix_bytes(weight_format, hidden, 2 * width) + matrix_bytes(weight_format, width, hidden)
