"""The model of `benchmarks.random_ernie` with random F16 weights as a GGUF file, for llama.cpp.

    python -m benchmarks.gguf_file ernie-f16.gguf
    llama-quantize ernie-f16.gguf ernie-q2_k.gguf Q2_K

Needs the package `gguf`, and 5.4 GB for the file. docs/llama.cpp.md says how to build llama.cpp, and what is compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import random_ernie
from engine.config import ModelConfig

ARCHITECTURE = "ernie4_5-moe"
"""llama.cpp's LLM_ARCH_ERNIE4_5_MOE."""


def write(path: Path) -> None:
    """Write the file; tensors of one shape get the same numbers, which take no time to make again."""
    import gguf

    config = ModelConfig.from_json(random_ernie.config_json())
    writer = gguf.GGUFWriter(path, ARCHITECTURE, use_temp_file=False)
    _describe(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    made: dict[tuple[int, ...], NDArray[Any]] = {}
    for name, shape, dtype in _tensors(config):
        if shape not in made:
            made[shape] = _values(shape, dtype)
        writer.add_tensor(name, made[shape])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: ModelConfig) -> None:
    shape = random_ernie.SHAPE
    writer.add_context_length(4096)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(shape["moe_num_experts"])
    writer.add_expert_used_count(shape["moe_k"])
    writer.add_expert_feed_forward_length(shape["moe_intermediate_size"])
    writer.add_expert_shared_count(shape["moe_num_shared_experts"])
    writer.add_expert_shared_feed_forward_length(shape["moe_num_shared_experts"] * shape["moe_intermediate_size"])
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(shape["moe_layer_start_index"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("none")


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], type[np.floating[Any]]]]:
    """Name, shape [output, input features] and dtype of each; without a head, llama.cpp takes the embedding."""
    shape = random_ernie.SHAPE
    hidden, head_dim, experts = shape["hidden_size"], shape["head_dim"], shape["moe_num_experts"]
    queries, keys = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim

    def mlp(layer: str, suffix: str, width: int, *stack: int) -> Iterator[tuple[str, tuple[int, ...], type[Any]]]:
        for name in ("gate", "up"):
            yield f"{layer}.ffn_{name}{suffix}.weight", (*stack, width, hidden), np.float16
        yield f"{layer}.ffn_down{suffix}.weight", (*stack, hidden, width), np.float16

    yield "token_embd.weight", (shape["vocab_size"], hidden), np.float16
    yield "output_norm.weight", (hidden,), np.float32
    for index in range(shape["num_hidden_layers"]):
        layer = f"blk.{index}"
        yield f"{layer}.attn_norm.weight", (hidden,), np.float32
        yield f"{layer}.ffn_norm.weight", (hidden,), np.float32
        yield f"{layer}.attn_q.weight", (queries, hidden), np.float16
        yield f"{layer}.attn_k.weight", (keys, hidden), np.float16
        yield f"{layer}.attn_v.weight", (keys, hidden), np.float16
        yield f"{layer}.attn_output.weight", (hidden, queries), np.float16
        if not config.is_moe_layer(index):
            yield from mlp(layer, "", shape["intermediate_size"])
            continue
        yield f"{layer}.ffn_gate_inp.weight", (experts, hidden), np.float32
        yield from mlp(layer, "_exps", shape["moe_intermediate_size"], experts)
        yield from mlp(layer, "_shexp", shape["moe_num_shared_experts"] * shape["moe_intermediate_size"])


def _values(shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Ones for a norm; else normal numbers that keep activations at the size they come in."""
    if len(shape) == 1:
        return np.ones(shape, dtype=dtype)
    numbers = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return (numbers / np.float32(shape[-1] ** 0.5)).astype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    write(parser.parse_args().path)


if __name__ == "__main__":
    main()
