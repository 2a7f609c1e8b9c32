"""Models that a plan can be made for by name: the shapes in their public config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.checkpoint.hub import resolve_model
from engine.config import ModelConfig, MoeConfig
from engine.errors import DibitError

_ERNIE: dict[str, Any] = {
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "rope_theta": 500000,
    "rms_norm_eps": 1e-5,
    "eos_token_ids": (2,),
}

FAMILIES = {
    "ernie-4.5-300b-a47b": ModelConfig(  # baidu/ERNIE-4.5-300B-A47B-PT
        **_ERNIE,
        architecture="ernie4_5_moe",
        hidden_size=8192,
        num_hidden_layers=54,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=28672,
        tie_word_embeddings=False,
        moe=MoeConfig(
            num_experts=64,
            num_experts_per_token=8,
            intermediate_size=3584,
            layer_start_index=3,
            layer_end_index=53,
        ),
    ),
    "ernie-4.5-21b-a3b": ModelConfig(  # baidu/ERNIE-4.5-21B-A3B-PT
        **_ERNIE,
        architecture="ernie4_5_moe",
        hidden_size=2560,
        num_hidden_layers=28,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=12288,
        tie_word_embeddings=True,
        moe=MoeConfig(
            num_experts=64,
            num_experts_per_token=6,
            num_shared_experts=2,
            intermediate_size=1536,
            layer_start_index=1,
            layer_end_index=27,
        ),
    ),
    "ernie-4.5-0.3b": ModelConfig(  # baidu/ERNIE-4.5-0.3B-PT
        **_ERNIE,
        architecture="ernie4_5",
        hidden_size=1024,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=3072,
        tie_word_embeddings=True,
    ),
    "qwen2.5-72b": ModelConfig(  # Qwen/Qwen2.5-72B-Instruct
        architecture="qwen2",
        vocab_size=152064,
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=29568,
        max_position_embeddings=32768,
        rope_theta=1000000,
        rope_interleaved=False,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        eos_token_ids=(151645,),
    ),
}


def find_model(text: str) -> ModelConfig:
    """The built-in model of that name, or the one in a folder or a repository (of which only config.json is read).

    Raises:
        DibitError: there is none; the message says what there is.
    """
    if (known := FAMILIES.get(text.lower())) is not None:
        return known
    try:
        return ModelConfig.from_folder(resolve_model(str(Path(text).expanduser()), weights=False))
    except DibitError as error:
        raise type(error)(f"{error}. Built-in models: {', '.join(FAMILIES)}") from None


REPOSITORIES = {
    ("ernie-4.5-300b-a47b", "bf16"): "baidu/ERNIE-4.5-300B-A47B-PT",
    ("ernie-4.5-300b-a47b", "wint2"): "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle",
    ("ernie-4.5-21b-a3b", "bf16"): "baidu/ERNIE-4.5-21B-A3B-PT",
    ("ernie-4.5-0.3b", "bf16"): "baidu/ERNIE-4.5-0.3B-PT",
    ("qwen2.5-72b", "bf16"): "Qwen/Qwen2.5-72B-Instruct",
}
"""Published weights of a built-in model in a layout; others are made with ``dibit quantize``."""
