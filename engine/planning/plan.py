"""What fits on a number of cards, and how fast it could be at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.config import EngineConfig, ModelConfig
from engine.errors import UnsupportedError
from engine.execution.kv_cache import block_bytes, blocks_on_gpu
from engine.layers.attention import heads_per_rank
from engine.planning.activations import step_bytes
from engine.planning.cards import Card
from engine.planning.layouts import Layout
from engine.planning.weights import Weights, weigh

CUDA_BYTES = 600 * 10**6
"""What CUDA's context, NCCL and the libraries take of each card. An assumption: not measured."""

GRAPH_BYTES = 500 * 10**6
"""What the CUDA graphs of all batch sizes take. An assumption: not measured."""

SIZES = (1, 2, 4, 8, 16)
"""Tensor-parallel sizes that are looked at."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What shall be served.

    Attributes:
        context: tokens of a sequence, prompt and answer.
        concurrency: sequences at once.
        kv_dtype: "bf16" or "int8".
    """

    context: int
    concurrency: int = 1
    kv_dtype: str = "bf16"


@dataclass(frozen=True, slots=True)
class Fit:
    """One engine of ``tensor_parallel_size`` cards; bytes are those of one card.

    Attributes:
        card: which.
        tensor_parallel_size: how many.
        weights: of rank 0.
        activations: what the largest step takes on top.
        graphs: of CUDA, assumed.
        other: CUDA's own, assumed.
        token_bytes: of the KV cache, for a token.
        kv_tokens: that the cache holds, a multiple of the block size; 0 if the weights alone are too much.
        max_context: tokens that the model was made for.
        max_num_seqs: sequences that a step takes.
        demand: what was asked for.
        decode_limit: tokens a second of all sequences of the demand, if only memory's bandwidth and the cards'
            arithmetic counted.
        single_limit: likewise of one sequence alone.
        prefill_limit: prompt tokens a second, likewise, of prompts as long as the demand's context.
    """

    card: Card
    tensor_parallel_size: int
    weights: Weights
    activations: int
    graphs: int
    other: int
    token_bytes: int
    kv_tokens: int
    max_context: int
    max_num_seqs: int
    demand: Demand
    decode_limit: float
    single_limit: float
    prefill_limit: float

    @property
    def fits(self) -> bool:
        """Whether the demand's sequences fit the cache and a step, all at their full length."""
        return self.largest_concurrency >= self.demand.concurrency

    @property
    def largest_context(self) -> int:
        """Tokens that each of the demand's sequences may have."""
        return min(self.kv_tokens // self.demand.concurrency, self.max_context)

    @property
    def largest_concurrency(self) -> int:
        """Sequences of the demand's context that the cache holds and a step takes."""
        return min(self.kv_tokens // self.demand.context, self.max_num_seqs)


def fit(
    model: ModelConfig, layout: Layout, demand: Demand, *, card: Card, size: int, engine: EngineConfig | None = None
) -> Fit:
    """One engine on ``size`` cards.

    Args:
        model: its shapes.
        layout: its formats.
        demand: what to serve.
        card: which cards.
        size: how many.
        engine: its limits of a step and its share of the memory; by default those of ``EngineConfig``.

    Raises:
        UnsupportedError: the model can't be cut so.
    """
    engine = engine or EngineConfig(model="")
    weights = weigh(model, layout, size)
    kv_dtype = torch.int8 if demand.kv_dtype == "int8" else torch.bfloat16
    _, kv_heads = heads_per_rank(model, size)
    block = block_bytes(model, kv_heads, block_size=engine.block_size, dtype=kv_dtype)
    token = block // engine.block_size
    activations = step_bytes(model, layout, engine, size)
    graphs = 0 if engine.enforce_eager else GRAPH_BYTES
    blocks = blocks_on_gpu(
        engine, block, total=card.memory_bytes, used=weights.total + CUDA_BYTES, activations=activations + graphs
    )
    batch, context = demand.concurrency, demand.context
    head = model.vocab_size * model.hidden_size
    return Fit(
        card=card,
        tensor_parallel_size=size,
        weights=weights,
        activations=activations,
        graphs=graphs,
        other=CUDA_BYTES,
        token_bytes=token,
        kv_tokens=blocks * engine.block_size,
        max_context=model.max_position_embeddings,
        max_num_seqs=engine.max_num_seqs,
        demand=demand,
        decode_limit=batch / _step_seconds(model, weights, card, size, batch=batch, context=context, token=token),
        single_limit=1 / _step_seconds(model, weights, card, size, batch=1, context=context, token=token),
        # A token of a prompt sees half of it on average, and only the last one's logits are computed.
        prefill_limit=card.flops * size / (2 * (weights.active - head) + _attention(model, context / 2)),
    )


def fits(
    model: ModelConfig, layout: Layout, demand: Demand, *, card: Card, engine: EngineConfig | None = None
) -> list[Fit]:
    """At every tensor-parallel size that the model can be cut for."""
    found = []
    for size in SIZES:
        try:
            found.append(fit(model, layout, demand, card=card, size=size, engine=engine))
        except UnsupportedError:
            continue
    return found


def least(candidates: Sequence[Fit]) -> Fit | None:
    """The smallest engine that holds the demand; None if none does."""
    return next((candidate for candidate in candidates if candidate.fits), None)


def _step_seconds(
    model: ModelConfig, weights: Weights, card: Card, size: int, *, batch: int, context: int, token: int
) -> float:
    """The least time of a decode step: its bytes over the bandwidth, or its operations over the rate."""
    read = weights.read(batch, model) + batch * context * token
    operations = batch * (2 * weights.active + _attention(model, context))
    return max(read / card.bandwidth, operations / (card.flops * size))


def _attention(model: ModelConfig, keys: float) -> float:
    """Operations of one token over so many keys in all layers: in every head, its scores and its sum of values."""
    return 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * keys
