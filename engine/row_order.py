"""Finding out in which row order the WINT2 matrices of a checkpoint stand, for files do not say it.

Under the wrong order 60 of the 64 rows of every group are in each other's places (``engine.quantization.wint2``). Two
kinds of evidence tell: an unquantized copy of one expert correlates with it under one order only; and a text that the
model predicts under one order is noise under the other. Weak evidence decides nothing.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint.loader import ShardedWeights
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.execution.batch import dummy_step
from engine.execution.parallel import TensorParallelGroup
from engine.layers.attention import AttentionInputs
from engine.layers.rotary import RotaryEmbedding
from engine.models import model_builder
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import RowOrder
from engine.quantization.wint2 import ROW_ORDER_ADVICE, Wint2
from engine.tokenizer import Tokenizer
from kernels import ops
from kernels.operands import Weight
from kernels.reference.dequantize import dequantize

logger = logging.getLogger(__name__)

ORDERS: tuple[RowOrder, RowOrder] = ("plain", "permuted")
MIN_CORRELATION = 0.5
"""Of the right order with the unquantized expert; 2-bit weights reach about 0.95."""
MIN_CORRELATION_LEAD = 0.3
"""Of the right order over the other, which reaches about 4/64 of it by the rows that stay in place."""
MIN_SIGMAS = 5.0
"""By how many standard errors the losses of the tokens must differ."""
MIN_LOSS_LEAD = 0.1
"""By how many nats a token they must differ, so that a large number of tokens can't make a trifle significant."""

TEXT = """\
The weather was fine in the morning, so they walked down to the river and sat there until noon. "What do we do when it \
rains?" she asked. He thought about it for a while. Water is made of hydrogen and oxygen. The capital of France is \
Paris, and the capital of Germany is Berlin. To be or not to be, that is the question.

def add(a, b):
    \"\"\"Return the sum of two numbers.\"\"\"
    return a + b

import os

class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16. Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.
"""
"""What most language models predict far better than chance: prose, facts, Python, and things in a row."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evidence says.

    Attributes:
        row_order: the order, or None if it is not clear.
        explanation: what was found and how sure it is, one sentence.
    """

    row_order: RowOrder | None
    explanation: str


def resolve(
    folder: Path,
    config: ModelConfig,
    *,
    reference: Path | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> RowOrder | None:
    """The row order of a checkpoint's WINT2 matrices: as its config.json says, else by evidence.

    Args:
        folder: the checkpoint.
        config: its config.
        reference: a folder with the same model unquantized; without it, a short text decides, for which all layers of
            the model run twice, one after the other.
        device: where to compute.
        dtype: compute dtype.

    Returns:
        None if nothing has to be known: there are no WINT2 matrices, or config.json says it.

    Raises:
        ConfigError: the evidence is too weak.
    """
    if QuantizationConfig.from_json(config.quantization).row_order_known:
        return None
    if reference is None:
        verdict = by_text(folder, config, device=device, dtype=dtype)
    else:
        verdict = by_expert(folder, config, reference)
    if verdict.row_order is None:
        raise ConfigError(
            f"{folder}: the row order of the WINT2 weights is not clear: {verdict.explanation}. {ROW_ORDER_ADVICE}"
        )
    logger.info(
        "%s: row order %s: %s. The option row_order: %s saves this check",
        folder,
        verdict.row_order,
        verdict.explanation,
        verdict.row_order,
    )
    return verdict.row_order


def by_expert(folder: Path, config: ModelConfig, reference: Path) -> Verdict:
    """Compare one expert of the first WINT2 layer with its unquantized copy in the folder ``reference``.

    Raises:
        ConfigError, CheckpointError: ``reference`` is not a folder of the same model.
    """
    layer = _first_layer(config)
    original_config = ModelConfig.from_folder(reference)
    if (original_config.hidden_size, original_config.moe) != (config.hidden_size, config.moe):
        raise ConfigError(f"{reference} is not the model of {folder}: hidden size or experts differ")
    if original_config.quantization:
        raise ConfigError(f"{reference} is quantized itself; expected the unquantized model")
    original = dequantize(_expert(reference, original_config, layer, None), torch.float32)
    plain, permuted = (
        _correlation(original, dequantize(_expert(folder, config, layer, order), torch.float32)) for order in ORDERS
    )
    found = f"correlation of layer {layer}'s first expert with {reference}: plain {plain:.3f}, permuted {permuted:.3f}"
    if max(plain, permuted) >= MIN_CORRELATION and abs(plain - permuted) >= MIN_CORRELATION_LEAD:
        return Verdict("plain" if plain > permuted else "permuted", found)
    wanted = f"at least {MIN_CORRELATION} for one and {MIN_CORRELATION_LEAD} less for the other"
    return Verdict(None, f"{found}; expected {wanted}")


def by_text(folder: Path, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Compare the losses on :data:`TEXT` under both orders. Memory holds one decoder layer and the two ends."""
    ids = torch.tensor(Tokenizer.from_folder(folder).encode(TEXT), device=device)
    plain, permuted = (_losses(folder, config, order, ids, device, dtype) for order in ORDERS)  # nats, [T - 1] each
    return by_losses(plain, permuted)


def by_losses(plain: Tensor, permuted: Tensor) -> Verdict:
    """Decide by the losses of the same tokens (nats, fp64 [T]) under both orders: a paired test."""
    difference = plain - permuted
    lead = float(difference.mean())
    error = float(difference.std()) / math.sqrt(len(difference))
    found = (
        f"loss of {len(difference)} tokens of text: plain {float(plain.mean()):.3f}, permuted "
        f"{float(permuted.mean()):.3f} nats a token, a difference of {abs(lead):.3f} +- {error:.3f}"
    )
    if not math.isfinite(lead) or abs(lead) < max(MIN_LOSS_LEAD, MIN_SIGMAS * error):
        return Verdict(None, f"{found}; expected at least {MIN_LOSS_LEAD} and {MIN_SIGMAS:.0f} standard errors")
    return Verdict("permuted" if lead > 0 else "plain", f"{found}, {abs(lead) / max(error, 1e-12):.0f} standard errors")


def _losses(
    folder: Path, config: ModelConfig, order: RowOrder, ids: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Nats of every token after the first, fp64 [T - 1], layer by layer."""
    count = len(ids)
    step = dummy_step(count, 1, count)
    metadata = ops.attention_metadata(
        step.block_tables, step.query_start, step.context_lens, block_size=count, dtype=dtype, device=device
    )
    rotary = RotaryEmbedding(config.head_dim, config.rope_theta, device)
    positions = torch.arange(count, device=device)
    inputs = AttentionInputs(rotary.table(positions), positions, metadata)
    shape = (2, 1, count, config.num_key_value_heads, config.head_dim)
    weights = _weights(folder, config, order, device, dtype)
    try:
        builder = model_builder(config, weights, TensorParallelGroup(0, 1), dtype=dtype, device=device)
        with torch.inference_mode():
            cache = ops.LayerCache(*torch.zeros(shape, dtype=dtype, device=device))
            x = F.embedding(ids, weights.embedding())  # [T, H]
            residual: Tensor | None = None
            for i in range(config.num_hidden_layers):
                x, residual = builder.layer(i)(x, residual, cache, inputs)
            hidden = builder.norm("norm")(x if residual is None else x + residual)
            logits = builder.linear(weights.head())(hidden)[:-1, : config.vocab_size]
            return F.cross_entropy(logits.double(), ids[1:], reduction="none")
    finally:
        weights.close()


def _first_layer(config: ModelConfig) -> int:
    quantization = QuantizationConfig.from_json(config.quantization)
    for layer in range(config.num_hidden_layers):
        if config.is_moe_layer(layer) and isinstance(quantization.format("experts", layer), Wint2):
            return layer
    raise ConfigError("no routed experts in WINT2 to compare with; leave the reference out, a text will decide")


def _expert(folder: Path, config: ModelConfig, layer: int, order: RowOrder | None) -> Weight:
    weights = _weights(folder, config, order, torch.device("cpu"), torch.float32)
    try:
        return weights.expert_down_of(layer, 0)
    finally:
        weights.close()


def _weights(
    folder: Path, config: ModelConfig, order: RowOrder | None, device: torch.device, dtype: torch.dtype
) -> ShardedWeights:
    return ShardedWeights(folder, config, rank=0, world_size=1, dtype=dtype, device=device, row_order=order)


def _correlation(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0))
