"""An ERNIE-4.5 MoE of random packed bytes: says nothing, and takes the time of a trained one of its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import names
from engine.checkpoint.writer import FolderWriter
from engine.compress.modules import Matrix, layer_matrices
from engine.config import ModelConfig
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import WeightFormat
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 2560,
    "num_hidden_layers": 4,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
"""Layers of ERNIE-4.5-21B-A3B, 4 of its 28, with a small vocabulary: its embedding and head are not quantized."""


DENSE: dict[str, WeightFormat] = {"wint8": Wint8(), "wint4": Wint4(), "wint2": Wint2(row_order="permuted")}
"""Formats for attention, shared experts and the dense layer; Baidu's 2-bit models have wint8."""


def config_json(dense: str = "wint8") -> dict[str, Any]:
    """The config.json."""
    formats = QuantizationConfig.of(dense=DENSE[dense], experts=Wint2(row_order="permuted"))
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        **SHAPE,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
        "quantization_config": formats.to_json(),
    }


def parameters(config: ModelConfig) -> int:
    """Weights of the model, the embedding that is its head too counted once."""
    hidden, count = config.hidden_size, config.vocab_size * config.hidden_size + config.hidden_size
    for layer in range(config.num_hidden_layers):
        count += 2 * hidden + sum(matrix.k * matrix.n for matrix in layer_matrices(config, layer))
        if config.moe is not None and config.is_moe_layer(layer):
            count += hidden * config.moe.num_experts
    return count


def write(folder: Path, dense: str = "wint8") -> ModelConfig:
    """Write the model folder (no tokenizer: it is for the executor alone); returns its config."""
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig.from_json(config_json(dense))
    formats = QuantizationConfig.from_json(config.quantization)
    with FolderWriter(folder) as writer:

        def add(name: str, tensor: Tensor) -> None:
            writer.add(names.PADDLE.name(name), tensor)

        hidden = config.hidden_size
        add("embed_tokens.weight", torch.randn(config.vocab_size, hidden, generator=generator).bfloat16())
        add("norm.weight", torch.ones(hidden).bfloat16())
        for layer in range(config.num_hidden_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                add(f"layers.{layer}.{norm}.weight", torch.ones(hidden).bfloat16())
            if config.moe is not None and config.is_moe_layer(layer):
                gate = torch.randn(hidden, config.moe.num_experts, generator=generator) / hidden**0.5
                add(f"layers.{layer}.mlp.gate.weight", gate)
            for matrix in layer_matrices(config, layer):
                for suffix, tensor in _tensors(formats.format(matrix.part, layer), matrix, generator).items():
                    add(f"{matrix.module}.{suffix}", tensor)
        writer.write_json("config.json", config_json(dense))
        writer.commit()
    return config


def _tensors(weight_format: WeightFormat, matrix: Matrix, generator: torch.Generator) -> dict[str, Tensor]:
    """Random integers, and scales that keep activations at the size they come in; the encoder's one codebook."""
    k, n = matrix.k, matrix.n
    ones = torch.ones(n)
    values = {
        "super_scales": ones.bfloat16() / (18 * 9 * k**0.5),  # rms of a window less 32, and of a group's scale
        "weight_scale": ones / (74 * k**0.5),  # rms of a signed byte
        "code_scale": ones * 128.5,
        "code_zp": ones * 0,
    }

    def tensor(suffix: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        if dtype in ("U8", "I8"):
            numbers = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            return numbers if dtype == "U8" else numbers.view(torch.int8)
        return values[suffix]

    return {suffix: tensor(suffix, spec.shape, spec.dtypes[0]) for suffix, spec in weight_format.tensors(k, n).items()}
