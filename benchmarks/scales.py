"""The models that benchmarks of kernels and of whole steps are about, and one like them for a machine without a GPU."""

from __future__ import annotations

from typing import Literal

from engine.config import ModelConfig, MoeConfig
from engine.planning.families import FAMILIES

LAYOUTS: tuple[Literal["wint2", "tight"], ...] = ("wint2", "tight")
"""Of `engine.planning.layouts`, the two for a model of experts in 2 bits."""

MODELS = {
    "300b": FAMILIES["ernie-4.5-300b-a47b"],
    "21b": FAMILIES["ernie-4.5-21b-a3b"],
    "tiny": ModelConfig(
        architecture="ernie4_5_moe", max_position_embeddings=131072, rope_theta=500000, rms_norm_eps=1e-5,
        eos_token_ids=(2,), vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, intermediate_size=512, tie_word_embeddings=False,
        moe=MoeConfig(num_experts=8, num_experts_per_token=2, intermediate_size=128, layer_start_index=1,
                      layer_end_index=3),
    ),
}  # fmt: skip
