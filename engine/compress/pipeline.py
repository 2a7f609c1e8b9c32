"""A bf16 model folder -> a folder in Baidu's 2-bit layout, one matrix after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.loader import ShardedWeights
from engine.checkpoint.names import PADDLE
from engine.checkpoint.writer import FolderWriter
from engine.compress import ccq, rtn
from engine.compress.packed import PackedWeight
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError, UnsupportedError
from engine.quantization.config import QuantizationConfig, Rule
from engine.quantization.format import RowOrder, WeightFormat
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8
from kernels.operands import DenseWeight, Weight

ATTENDANTS = ("*token*", "*vocab*", "merges.txt", "*.model", "*.jinja", "generation_config.json", "LICENSE*")
"""Files of a model folder that go along unchanged."""


@dataclass(slots=True)
class GroupSummary:
    """What became of one kind of matrices ("attention", "routed experts") in one format."""

    group: str
    format: str
    num_weights: int = 0
    num_bytes: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0

    @property
    def relative_error(self) -> float:
        """Squared error as a part of the weights' squares."""
        return self.squared_error / max(self.squared_weight, 1e-30)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, scales included."""
        return 8 * self.num_bytes / self.num_weights


@dataclass(slots=True)
class Report:
    """What :func:`quantize_folder` wrote."""

    groups: dict[tuple[str, str], GroupSummary] = field(default_factory=dict)
    num_bytes: int = 0
    """Bytes of tensor data, unquantized tensors included."""

    def add(self, group: str, weight: Tensor, packed: PackedWeight) -> None:
        """Count one matrix, ``weight`` [out, in] before and ``packed`` after."""
        name = packed.weight_format.name
        summary = self.groups.setdefault((group, name), GroupSummary(group, name))
        reference = weight.float()
        summary.num_weights += weight.numel()
        summary.num_bytes += round(packed.bits_per_weight * weight.numel() / 8)
        summary.squared_error += float((packed.dequantize().float() - reference).square().sum())
        summary.squared_weight += float(reference.square().sum())


def two_bit_plan(config: ModelConfig, *, wint4_layers: int = 1, row_order: RowOrder = "plain") -> QuantizationConfig:
    """Baidu's plan: WINT8 for dense linears, WINT4 for the first ``wint4_layers`` MoE layers, WINT2 for the others.

    Raises:
        ConfigError: the model has no routed experts, or not more than ``wint4_layers`` layers of them.
    """
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    if not 1 <= wint4_layers < len(layers):
        raise ConfigError(
            f"{wint4_layers} WINT4 layers in a model with {len(layers)} MoE layers; expected 1 to {len(layers) - 1}"
        )
    last_w4 = layers[wint4_layers - 1]
    return QuantizationConfig.of(
        dense=Wint8(),
        experts=(
            Rule("experts", Wint4(), 0, last_w4),
            Rule("experts", Wint2(row_order), last_w4 + 1, layers[-1]),
        ),
    )


def quantize_folder(
    source: Path,
    target: Path,
    *,
    plan: QuantizationConfig,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Quantize the model in ``source`` and write it to ``target`` under Paddle's names.

    Embedding, head and norms stay bf16, the router fp32; the multi-token prediction module is left out. ``target``
    appears when it is complete.

    Args:
        source: a bf16 model folder, torch or Paddle names.
        target: the folder to write.
        plan: the format of each group, as :func:`two_bit_plan` makes it.
        overwrite: replace ``target`` if it is there.
        progress: called with each matrix's name, the weights quantized so far and all of them.

    Raises:
        UnsupportedError: ``source`` is quantized already, or a matrix does not fit its format.
        CheckpointError, ConfigError: ``source`` is not a sound model folder, or ``target`` exists.
    """
    config = ModelConfig.from_folder(source)
    if config.quantization:
        raise UnsupportedError(f"{source} is quantized already; expected a folder of bf16 weights")
    weights = ShardedWeights(source, config, rank=0, world_size=1, dtype=torch.bfloat16, device=torch.device("cpu"))
    report = Report()
    total, done = _count_weights(config), 0
    try:
        with FolderWriter(target, overwrite=overwrite) as writer:
            for name, tensor in _unquantized(weights, config):
                writer.add(PADDLE.name(name), tensor)
            for group, module, weight, weight_format in _matrices(weights, config, plan):
                packed = _encode(module, weight, weight_format)
                for suffix, tensor in packed.tensors.items():
                    writer.add(f"{PADDLE.name(module)}.{suffix}", tensor)
                report.add(group, weight, packed)
                done += weight.numel()
                if progress is not None:
                    progress(module, done, total)
            raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
            writer.write_json("config.json", raw | {"is_quantized": True, "quantization_config": plan.to_json()})
            for file in sorted({path for pattern in ATTENDANTS for path in source.glob(pattern)}):
                writer.copy(file)
            writer.commit()
            report.num_bytes = writer.num_bytes
    finally:
        weights.close()
    return report


def _unquantized(weights: ShardedWeights, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    yield "embed_tokens.weight", weights.embedding()
    for layer in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"layers.{layer}.{norm}.weight", weights.norm(f"layers.{layer}.{norm}")
        if config.is_moe_layer(layer):
            gate, bias = weights.router(layer)
            yield f"layers.{layer}.mlp.gate.weight", gate.T  # [H, E]
            if bias is not None:
                yield f"layers.{layer}.mlp.moe_statics.e_score_correction_bias", bias[None]  # [1, E]
    yield "norm.weight", weights.norm("norm")
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.head().weight.T  # [H, V]


def _matrices(
    weights: ShardedWeights, config: ModelConfig, plan: QuantizationConfig
) -> Iterator[tuple[str, str, Tensor, WeightFormat]]:
    """(group, module, weight [out, in], format) of every matrix to quantize; one layer's experts are in memory."""
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        yield "attention", f"{prefix}.self_attn.qkv_proj", _dense(weights.qkv(layer)), plan.format("attention", layer)
        output = _dense(weights.attention_output(layer))
        yield "attention", f"{prefix}.self_attn.o_proj", output, plan.format("attention", layer)
        if config.moe is None or not config.is_moe_layer(layer):
            yield "dense MLP", f"{prefix}.mlp.up_gate_proj", _dense(weights.gate_up(layer)), plan.format("mlp", layer)
            yield "dense MLP", f"{prefix}.mlp.down_proj", _dense(weights.down(layer)), plan.format("mlp", layer)
            continue
        expert_format = plan.format("experts", layer)
        for projection, read in (("up_gate_proj", weights.expert_gate_up), ("down_proj", weights.expert_down)):
            for expert, weight in enumerate(_dense(read(layer))):
                yield "routed experts", f"{prefix}.mlp.experts.{expert}.{projection}", weight, expert_format
        if config.moe.num_shared_experts:
            shared_format = plan.format("shared_experts", layer)
            up = _dense(weights.gate_up(layer, shared=True))
            yield "shared experts", f"{prefix}.mlp.shared_experts.up_gate_proj", up, shared_format
            down = _dense(weights.down(layer, shared=True))
            yield "shared experts", f"{prefix}.mlp.shared_experts.down_proj", down, shared_format


def _count_weights(config: ModelConfig) -> int:
    """Weights of all matrices that :func:`_matrices` yields."""
    hidden, moe = config.hidden_size, config.moe
    total = 0
    for layer in range(config.num_hidden_layers):
        total += 2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
        if moe is not None and config.is_moe_layer(layer):
            total += 3 * hidden * (moe.num_experts * moe.intermediate_size + moe.shared_intermediate_size)
        else:
            total += 3 * hidden * config.intermediate_size
    return total


def _encode(module: str, weight: Tensor, weight_format: WeightFormat) -> PackedWeight:
    if not weight.isfinite().all():
        raise CheckpointError(f"{module} holds values that are not finite; it can't be quantized")
    match weight_format:
        case Wint8():
            return rtn.quantize(weight, bits=8)
        case Wint4():
            return rtn.quantize(weight, bits=4)
        case Wint2(row_order):
            return ccq.quantize(weight, row_order=row_order or "plain")
    raise UnsupportedError(f"there is no encoder for {weight_format.name!r}; there are wint8, wint4, wint2")


def _dense(weight: Weight) -> Tensor:
    if not isinstance(weight, DenseWeight):
        raise UnsupportedError(f"expected unquantized weights, found {type(weight).__name__}")
    return weight.weight
