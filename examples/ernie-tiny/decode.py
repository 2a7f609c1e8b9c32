"""Read a quantized folder back into the training-time model's tensors, through the engine's own loader."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout without installing it

from engine.checkpoint.loader import ShardedWeights
from engine.config import ModelConfig
from kernels.operands import Weight
from kernels.reference.dequantize import dequantize


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder under the names of `model.Ernie`, fp32, experts stacked."""
    config = ModelConfig.from_folder(folder)
    weights = ShardedWeights(
        folder, config, rank=0, world_size=1, dtype=torch.float32, device=torch.device("cpu"), progress=None
    )
    heads = [count * config.head_dim for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    named = {
        "model.embed_tokens.weight": weights.embedding(),
        "lm_head.weight": _dense(weights.head()),
        "model.norm.weight": weights.norm("norm"),
    }
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named[f"{layer}.{norm}.weight"] = weights.norm(f"layers.{i}.{norm}")
        for name, part in zip("qkv", _dense(weights.qkv(i)).split(heads), strict=True):
            named[f"{layer}.self_attn.{name}_proj.weight"] = part
        named[f"{layer}.self_attn.o_proj.weight"] = _dense(weights.attention_output(i))
        if config.is_moe_layer(i):
            gate, bias = weights.router(i)
            named[f"{layer}.mlp.gate.weight"] = gate
            if bias is not None:
                named[f"{layer}.mlp.moe_statics.e_score_correction_bias"] = bias.unsqueeze(0)
            named[f"{layer}.mlp.experts.gate_up_proj"] = _dense(weights.expert_gate_up(i))
            named[f"{layer}.mlp.experts.down_proj"] = _dense(weights.expert_down(i))
        else:
            gate, up = _dense(weights.gate_up(i)).chunk(2)
            named[f"{layer}.mlp.gate_proj.weight"], named[f"{layer}.mlp.up_proj.weight"] = gate, up
            named[f"{layer}.mlp.down_proj.weight"] = _dense(weights.down(i))
    weights.close()
    return named


def _dense(weight: Weight) -> Tensor:
    return dequantize(weight, torch.float32)  # [..., out, in]
