"""Small random checkpoints of every architecture, as transformers saves them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CLASSES = {
    "ernie4_5": (Ernie4_5Config, Ernie4_5ForCausalLM),
    "ernie4_5_moe": (Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


@dataclass(frozen=True)
class Variant:
    """A configuration and how its folder is written."""

    name: str
    architecture: str
    fields: dict[str, Any]
    tensor_parallel_sizes: tuple[int, ...] = (1, 2, 4)
    correction_bias: bool = True
    """False: the tensor is taken out of the file, as in checkpoints without one."""
    top_level_rope_theta: bool = False
    dropped_fields: tuple[str, ...] = ()
    """Fields taken out of config.json, whose values are the architecture's defaults."""


OWN = ("tensor_parallel_sizes", "correction_bias", "top_level_rope_theta", "dropped_fields")
BASE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _variant(name: str, architecture: str, fields: dict[str, Any]) -> Variant:
    own = {key: fields.pop(key) for key in OWN if key in fields}
    return Variant(name, architecture, {**BASE, **HEADS, **fields}, **own)


def _dense(name: str, **fields: Any) -> Variant:
    return _variant(name, "ernie4_5", {"head_dim": 8, **fields})


def _moe(name: str, **fields: Any) -> Variant:
    experts = {"moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 0}
    return _variant(name, "ernie4_5_moe", {"head_dim": 8, "num_hidden_layers": 3, **experts, **fields})


def _qwen2(name: str, **fields: Any) -> Variant:
    return _variant(name, "qwen2", fields)


VARIANTS = [
    _dense("dense-tied", tie_word_embeddings=True),
    _dense("dense-untied-odd-vocabulary", tie_word_embeddings=False, vocab_size=67),
    _dense("dense-wide-heads-old-rope", head_dim=16, tie_word_embeddings=True, top_level_rope_theta=True, theta=3e4),
    _dense("dense-one-kv-head", num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=True, vocab_size=65),
    _dense("dense-all-kv-heads", num_key_value_heads=4, tie_word_embeddings=False, rms_norm_eps=1e-3),
    _dense("dense-indivisible", num_attention_heads=3, num_key_value_heads=3, tensor_parallel_sizes=(1,)),
    _moe("moe-no-shared", moe_layer_start_index=0, tie_word_embeddings=False),
    _moe("moe-one-shared", moe_num_shared_experts=1, moe_layer_start_index=1, tie_word_embeddings=True, vocab_size=71),
    _moe("moe-two-shared-old-rope", moe_num_shared_experts=2, moe_layer_start_index=1, moe_k=3,
         tie_word_embeddings=True, top_level_rope_theta=True, theta=1e6),
    _moe("moe-no-bias", correction_bias=False, moe_layer_start_index=0, moe_num_shared_experts=2,
         tie_word_embeddings=False),
    _moe("moe-middle-layers", num_hidden_layers=5, moe_layer_start_index=1, moe_layer_end_index=3, moe_k=4),
    _moe("moe-every-other-layer", num_hidden_layers=5, moe_layer_start_index=0, moe_layer_interval=2,
         head_dim=16, moe_num_shared_experts=1, vocab_size=66),
    _moe("moe-interval-and-range", num_hidden_layers=6, moe_layer_start_index=1, moe_layer_end_index=4,
         moe_layer_interval=2, tie_word_embeddings=False),
    _moe("moe-all-experts-chosen", moe_num_experts=5, moe_k=5, num_key_value_heads=1, moe_layer_start_index=0,
         moe_norm_min=0.9),
    _qwen2("qwen2-tied", tie_word_embeddings=True),
    _qwen2("qwen2-untied-odd-vocabulary", tie_word_embeddings=False, vocab_size=67, rms_norm_eps=1e-3),
    _qwen2("qwen2-wide-heads-old-rope", head_dim=16, tie_word_embeddings=True, top_level_rope_theta=True, theta=1e6),
    _qwen2("qwen2-one-kv-head", num_attention_heads=8, num_key_value_heads=1, head_dim=8, num_hidden_layers=3),
    _qwen2("qwen2-all-kv-heads", num_key_value_heads=4, tie_word_embeddings=True, vocab_size=65),
    _qwen2("qwen2-defaults", theta=1e4, rms_norm_eps=1e-6, max_position_embeddings=32768, tie_word_embeddings=False,
           dropped_fields=("rope_parameters", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
                           "layer_types", "use_sliding_window", "hidden_act")),
    _qwen2("qwen2-window-over-no-layer", use_sliding_window=True, sliding_window=4, max_window_layers=2),
]  # fmt: skip


def save(variant: Variant, folder: Path) -> PreTrainedModel:
    """Make the model, write its folder as the variant wants it, and return it in fp32 for comparison."""
    fields = dict(variant.fields)
    theta = fields.pop("theta", 5e5)
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    fields.setdefault("max_position_embeddings", 256)
    torch.manual_seed(sum(map(ord, variant.name)))
    config_class, model_class = CLASSES[variant.architecture]
    # Large weights: logits then differ visibly if anything at all is different.
    model = model_class(config_class(**fields, initializer_range=0.2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("_proj.bias"):  # zero in a new model
                parameter.uniform_(-1, 1)
            if name.endswith("e_score_correction_bias") and variant.correction_bias:
                parameter.uniform_(-0.3, 0.3)
    model.eval().save_pretrained(folder)
    if not variant.correction_bias:
        _remove(folder, "e_score_correction_bias")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if variant.top_level_rope_theta:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    for name in variant.dropped_fields:
        del config[name]
    path.write_text(json.dumps(config))
    return model


def _remove(folder: Path, ending: str) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(ending)}
    save_file(tensors, path, metadata={"format": "pt"})
