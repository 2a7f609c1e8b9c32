"""Bytes of one rank's weights by part, from shapes and formats alone, and what a decode step must read of them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from engine.checkpoint.partition import MatrixCut, Partition, check_size
from engine.config import ModelConfig
from engine.planning.layouts import Layout
from engine.quantization.bf16 import Bf16
from engine.quantization.format import WeightFormat
from engine.quantization.vocabulary import table_bytes
from engine.quantization.wint2 import Wint2

ITEM_BYTES = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4}
"""By safetensors' names."""
CODEBOOK_BYTES = 8
"""Of a column of WINT2 with a codebook of its own."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of rank 0, which has the most, and parameters of the whole model.

    Attributes:
        parts: by part and format.
        experts: of those, the routed experts.
        lookup: of those, the embedding table, of which a step reads only a few rows.
        parameters: of the linears, all ranks.
        active: of those, the ones that each token goes through.
    """

    parts: dict[str, int]
    experts: int
    lookup: int
    parameters: int
    active: int

    @property
    def total(self) -> int:
        """All weights of the rank."""
        return sum(self.parts.values())

    def read(self, batch: int, model: ModelConfig) -> float:
        """Bytes that a decode step of ``batch`` sequences must read, if tokens choose experts evenly and apart."""
        moe = model.moe
        touched = 1 - (1 - moe.num_experts_per_token / moe.num_experts) ** batch if moe else 0.0
        return self.total - self.experts - self.lookup + touched * self.experts


def weigh(model: ModelConfig, layout: Layout, tensor_parallel_size: int = 1) -> Weights:
    """The bytes of one rank.

    Raises:
        UnsupportedError: the model in these formats can't be cut for so many ranks, or a shape doesn't fit a format.
    """
    check_size(model, layout.formats, tensor_parallel_size)
    part = Partition(model, 0, tensor_parallel_size)
    parts: dict[str, int] = defaultdict(int)
    parameters = active = experts = 0

    def add(name: str, weight_format: WeightFormat, cuts: list[MatrixCut], *, count: int = 1, used: int = 1) -> int:
        nonlocal parameters, active
        size = count * sum(matrix_bytes(weight_format, *_shape(cut)) for cut in cuts)
        if layout.one_codebook and isinstance(weight_format, Wint2):
            size -= count * CODEBOOK_BYTES * sum(_shape(cut)[1] for cut in cuts)
        whole = sum(cut.k * sum(block.width for block in cut.blocks) for cut in cuts)
        parameters += count * whole
        active += used * whole
        parts[f"{name}, {weight_format.name}"] += size
        return size

    def mlp(width: int) -> list[MatrixCut]:
        return [part.gate_up(width), part.rows(width)]

    rows = len(part.vocabulary())
    table, kind = table_bytes(rows, model.hidden_size, layout.embeddings), layout.embeddings or "bf16"
    parts[f"embedding, {kind}"] = table
    if not model.tie_word_embeddings:
        parts[f"head, {kind}"] = table
    active += model.vocab_size * model.hidden_size
    parameters += model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    parts["norms, bf16"] = (2 * model.num_hidden_layers + 1) * model.hidden_size * 2
    for layer in range(model.num_hidden_layers):
        output = part.rows(model.num_attention_heads * model.head_dim)
        add("attention", layout.formats.format("attention", layer), [part.qkv(), output])
        moe = model.moe
        if moe is None or not model.is_moe_layer(layer):
            add("dense layers", layout.formats.format("mlp", layer), mlp(model.intermediate_size))
            continue
        parts["router, fp32"] += (model.hidden_size + 1) * moe.num_experts * 4
        experts += add(
            "experts",
            layout.formats.format("experts", layer),
            mlp(moe.intermediate_size),
            count=moe.num_experts,
            used=moe.num_experts_per_token,
        )
        if moe.num_shared_experts:
            add("shared experts", layout.formats.format("shared_experts", layer), mlp(moe.shared_intermediate_size))
    return Weights(
        parts=dict(parts),
        experts=experts,
        lookup=0 if model.tie_word_embeddings else table,
        parameters=parameters,
        active=active,
    )


def matrix_bytes(weight_format: WeightFormat, k: int, n: int) -> int:
    """Bytes of a [K, N] matrix, as its format stores it."""
    if isinstance(weight_format, Bf16):
        return 2 * k * n
    specs = weight_format.tensors(k, n).values()
    return sum(math.prod(spec.shape) * ITEM_BYTES[spec.dtypes[0]] for spec in specs)


def _shape(cut: MatrixCut) -> tuple[int, int]:
    """K and N of the rank's share."""
    return len(cut.rows), sum(len(block.part) for block in cut.blocks)
