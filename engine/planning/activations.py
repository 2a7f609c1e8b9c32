"""What the largest step of a rank takes of its GPU beside weights and cache, from shapes alone.

It follows what ``engine.models.decoder`` and ``kernels.gpu`` keep at once; a test holds it against such a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig, MoeConfig
from engine.execution.sampler import sampling_bytes
from engine.layers.attention import heads_per_rank
from engine.planning.layouts import Layout
from engine.quantization.bf16 import Bf16
from engine.quantization.config import Part

PROGRAMS, TOKENS, FEATURES, MOST_SPLITS = 1056, 64, 128, 16
"""``kernels.gpu.shapes`` (which wants Triton) cuts a product along K until there are so many programs, each of so many
tokens and output features, but into at most so many parts. That is for short steps of narrow models."""
LEAST_INPUTS = {"wint4": 512, "wint2": 1024}
"""Input features of such a part, at least: four tiles. 256 in other formats."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Of a part's matrices in all layers: whether any are packed, and input features of a part along K, at least."""

    packed: bool
    least: int


def step_bytes(model: ModelConfig, layout: Layout, engine: EngineConfig, size: int) -> int:
    """Bytes at the peak of a step of ``max_num_batched_tokens`` tokens of ``max_num_seqs`` sequences, bf16.

    Four rows of the hidden size a token live through a layer: the output of the layer before, the residual stream
    before and after it, and the normed input. On top come the widest moments of attention, of a dense MLP or of the
    experts; at the end, the logits in bf16 and in fp32; or, after the step, what sampling takes.

    Args:
        model: its shapes.
        layout: its formats; packed weights want their activations arranged, which is a copy.
        engine: its limits of a step.
        size: tensor-parallel size.
    """
    tokens, seqs = engine.max_num_batched_tokens, min(engine.max_num_seqs, engine.max_num_batched_tokens)
    row = 2 * tokens * model.hidden_size
    moments = [_attention(model, layout, tokens, size)]
    if any(not model.is_moe_layer(layer) for layer in range(model.num_hidden_layers)):
        inner = model.intermediate_size // size
        moments.append(_mlp(tokens, model.hidden_size, inner, _kind(model, layout, "mlp")))
    if model.moe is not None:
        moments.append(_experts(model, model.moe, _kind(model, layout, "experts"), tokens, size))
    logits = seqs * (2 * -(-model.vocab_size // size) + 4 * model.vocab_size)
    return max(4 * row + max(moments), 2 * row + logits, sampling_bytes(engine, model.vocab_size))


def _kind(model: ModelConfig, layout: Layout, part: Part) -> Kind:
    formats = [layout.formats.format(part, i) for i in range(model.num_hidden_layers)]
    return Kind(
        packed=any(not isinstance(each, Bf16) for each in formats),
        least=min(LEAST_INPUTS.get(each.name, 256) for each in formats),
    )


def _sums(rows: int, blocks: int, k: int, n: int, *, kind: Kind) -> int:
    """What a product [rows, K] x [K, N] writes: bf16, or fp32 for every part of K."""
    splits = min(PROGRAMS // (blocks * -(-n // FEATURES)), k // kind.least, MOST_SPLITS)
    return (4 * splits if splits > 1 else 2) * rows * n


def _product(tokens: int, k: int, n: int, *, kind: Kind) -> int:
    """The arranged input [T, K], and the sums [T, N]; a dense matrix wants neither."""
    if not kind.packed:
        return 2 * tokens * n
    return 2 * tokens * k + _sums(tokens, -(-tokens // TOKENS), k, n, kind=kind)


def _attention(model: ModelConfig, layout: Layout, tokens: int, size: int) -> int:
    """Queries, keys and values; turned queries; what attention makes of them; and the product with that."""
    heads, kv_heads = heads_per_rank(model, size)
    width = heads * model.head_dim
    kind = _kind(model, layout, "attention")
    together = width + 2 * kv_heads * model.head_dim
    first = _product(tokens, model.hidden_size, together, kind=kind)
    return max(first, 2 * tokens * (together + 2 * width) + _product(tokens, width, model.hidden_size, kind=kind))


def _mlp(tokens: int, hidden: int, inner: int, kind: Kind) -> int:
    first = _product(tokens, hidden, 2 * inner, kind=kind)
    between = 2 * tokens * 3 * inner
    second = 2 * tokens * inner + _product(tokens, inner, hidden, kind=kind)
    return max(first, between, second)


def _experts(model: ModelConfig, moe: MoeConfig, kind: Kind, tokens: int, size: int) -> int:
    """For each of a token's experts a row of its own; and the output."""
    inner, pairs = moe.intermediate_size // size, tokens * moe.num_experts_per_token
    row = 2 * tokens * model.hidden_size
    blocks = pairs // TOKENS + moe.num_experts
    sums = _sums(pairs, blocks, model.hidden_size, 2 * inner, kind=kind)
    first = row * kind.packed + sums
    between = sums + 2 * pairs * inner
    second = 2 * pairs * inner * (1 + kind.packed) + _sums(pairs, blocks, inner, model.hidden_size, kind=kind)
    return row + max(first, between, second)
