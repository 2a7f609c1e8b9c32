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
from engine.quantization.vocabulary import QuantizeEmbeddings, table_bytes
from engine.quantization.wint2 import Wint2
from kernels.cache import token_bytes

USABLE_BYTES = 84_000_000_000
"""What a process can have of a card of 80 GB (81,559 MiB of an H100 by nvidia-smi, less CUDA's own)."""
SPARE_BYTES = 1_500_000_000
"""For activations and CUDA graphs."""
CODEBOOK_BYTES = 8
"""Of a column of WINT2 with a codebook of its own."""
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

    def cache_tokens(self, usable: int, spare: int) -> int:
        """Tokens of KV cache that fit into `usable` bytes beside the weights and `spare`; negative if those do not."""
        return (usable - spare - self.weights) // self.token


def plan(
    model: ModelConfig,
    formats: QuantizationConfig,
    *,
    embeddings: QuantizeEmbeddings | None,
    kv_dtype: torch.dtype,
    one_codebook: bool,
) -> Plan:
    """The bytes of `model` on one GPU.

    Args:
        model: for its shapes.
        formats: of the layers.
        embeddings: of token embedding and head; None for bf16.
        kv_dtype: of keys and values.
        one_codebook: WINT2 experts have one each, as `dibit quantize` makes them: a GPU then keeps none for the columns
            (`kernels.gpu.pack`).
    """
    hidden, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    parts: dict[str, int] = defaultdict(int)
    table = table_bytes(model.vocab_size, hidden, embeddings)
    parts[f"embedding, {embeddings or 'bf16'}"] = table
    if not model.tie_word_embeddings:
        parts[f"head, {embeddings or 'bf16'}"] = table
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
        if one_codebook and isinstance(routed, Wint2):
            size -= CODEBOOK_BYTES * moe.num_experts * (2 * moe.intermediate_size + hidden)
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
