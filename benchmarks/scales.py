"""The models that benchmarks of kernels and of whole steps are about, and one like them for a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.config import ModelConfig, MoeConfig
from engine.quantization.config import QuantizationConfig, Rule
from engine.quantization.vocabulary import QuantizeEmbeddings
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

_COMMON: dict[str, Any] = {
    "architecture": "ernie4_5_moe",
    "max_position_embeddings": 131072,
    "rope_theta": 500000,
    "rms_norm_eps": 1e-5,
    "eos_token_ids": (2,),
}

MODELS = {
    "300b": ModelConfig(  # config.json of baidu/ERNIE-4.5-300B-A47B-PT
        **_COMMON, vocab_size=103424, hidden_size=8192, num_hidden_layers=54, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, intermediate_size=28672, tie_word_embeddings=False,
        moe=MoeConfig(num_experts=64, num_experts_per_token=8, intermediate_size=3584, layer_start_index=3,
                      layer_end_index=53),
    ),
    "21b": ModelConfig(  # config.json of baidu/ERNIE-4.5-21B-A3B-PT
        **_COMMON, vocab_size=103424, hidden_size=2560, num_hidden_layers=28, num_attention_heads=20,
        num_key_value_heads=4, head_dim=128, intermediate_size=12288, tie_word_embeddings=True,
        moe=MoeConfig(num_experts=64, num_experts_per_token=6, num_shared_experts=2, intermediate_size=1536,
                      layer_start_index=1, layer_end_index=27),
    ),
    "tiny": ModelConfig(
        **_COMMON, vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, intermediate_size=512, tie_word_embeddings=False,
        moe=MoeConfig(num_experts=8, num_experts_per_token=2, intermediate_size=128, layer_start_index=1,
                      layer_end_index=3),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """Formats of every part.

    Attributes:
        formats: of the layers.
        embeddings: of token embedding and logits' projection; None for bf16.
        kv_dtype: of keys and values; None for the compute dtype.
        one_codebook: every WINT2 matrix has one for all its columns, as `dibit quantize` writes them.
    """

    formats: QuantizationConfig
    embeddings: QuantizeEmbeddings | None
    kv_dtype: torch.dtype | None
    one_codebook: bool


def layout(name: str, model: ModelConfig) -> Layout:
    """ "baidu" as in ERNIE-4.5-300B-A47B-2Bits-Paddle, or "tight", for one card of 80 GB.

    "baidu": WINT8, and experts in WINT4 in the first four MoE layers (3 to 6 of the 300B), then in WINT2; embedding and
    head are bf16. "tight": experts in WINT2, all else in WINT4, embedding and head in grouped int4; int8 keys and
    values.
    """
    wint2 = Wint2("plain")
    if name == "tight":
        return Layout(QuantizationConfig.of(dense=Wint4(), experts=wint2), "int4", torch.int8, one_codebook=True)
    if name != "baidu":
        raise ValueError(f"layout {name!r}; there are baidu and tight")
    last = min(model.moe.layer_start_index + 3 if model.moe else 0, model.num_hidden_layers - 2)
    experts = (Rule("experts", Wint4(), 0, last), Rule("experts", wint2, last + 1))
    return Layout(QuantizationConfig.of(dense=Wint8(), experts=experts), None, None, one_codebook=False)
