"""A small checkpoint with what a loader has to handle: dense and MoE layers, grouped heads, an odd vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

SMALL_CONFIG: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
    "moe_intermediate_size": 256,
    "moe_num_experts": 3,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def torch_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors of a ``-PT`` checkpoint; matrices bf16 [out, in], the router fp32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)

    hidden, experts = config["hidden_size"], config["moe_num_experts"]
    q_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], hidden), "model.norm.weight": random(hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = random(hidden)
        for piece, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            tensors[f"{prefix}.self_attn.{piece}_proj.weight"] = random(width, hidden)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = random(hidden, q_width)
        widths = {"mlp": config["intermediate_size"]}
        if layer >= config["moe_layer_start_index"]:
            inner = config["moe_intermediate_size"]
            widths = {f"mlp.experts.{expert}": inner for expert in range(experts)}
            if config["moe_num_shared_experts"]:
                widths["mlp.shared_experts"] = inner * config["moe_num_shared_experts"]
            tensors[f"{prefix}.mlp.gate.weight"] = random(experts, hidden, dtype=torch.float32)
            bias = random(1, experts, dtype=torch.float32)
            tensors[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = bias
        for module, width in widths.items():
            for piece in ("gate", "up"):
                tensors[f"{prefix}.{module}.{piece}_proj.weight"] = random(width, hidden)
            tensors[f"{prefix}.{module}.down_proj.weight"] = random(hidden, width)
    return tensors


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., dict[str, Tensor]]:
    """``write_checkpoint(folder, **config)`` writes a ``-PT`` folder and returns its tensors."""

    def write(folder: Path, **changes: Any) -> dict[str, Tensor]:
        config = SMALL_CONFIG | changes
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = torch_tensors(config)
        save_file(tensors, folder / "model.safetensors")
        return tensors

    return write
