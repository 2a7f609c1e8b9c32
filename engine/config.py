"""What a model is (read from its config.json) and how an engine runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import ConfigError, UnsupportedError

SUPPORTED_ARCHITECTURES = {
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_ForCausalLM": "ernie4_5",  # the spelling of early 0.3B uploads
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
}


class MoeConfig(BaseModel):
    """The mixture-of-experts part of a model.

    Layer ``i`` (from 0) is MoE iff ``(i + 1) % layer_interval == 0`` and
    ``layer_start_index <= i <= layer_end_index``.
    """

    model_config = ConfigDict(frozen=True)

    num_experts: int = Field(ge=1)
    num_experts_per_token: int = Field(ge=1)
    num_shared_experts: int = Field(ge=0, default=0)
    intermediate_size: int = Field(ge=1)
    layer_start_index: int = Field(ge=0)
    layer_end_index: int = Field(ge=0)
    layer_interval: int = Field(ge=1, default=1)
    norm_min: float = Field(gt=0, default=1e-12)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that holds all shared experts; 0 without any."""
        return self.intermediate_size * self.num_shared_experts

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (from 0) has routed experts."""
        return (layer + 1) % self.layer_interval == 0 and self.layer_start_index <= layer <= self.layer_end_index


class ModelConfig(BaseModel):
    """A decoder-only model, in the names every layer of Dibit uses.

    Made by :meth:`from_folder` from a Hugging Face style ``config.json`` (``-PT`` and ``-Paddle`` repositories alike).
    """

    model_config = ConfigDict(frozen=True)

    architecture: Literal["ernie4_5", "ernie4_5_moe"]
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    intermediate_size: int = Field(ge=1)
    max_position_embeddings: int = Field(ge=1)
    rope_theta: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None = None
    quantization: dict[str, Any] | None = None
    """``quantization_config`` of config.json as it stands; ``engine.quantization`` gives it meaning."""

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary embeddings")
        if self.moe and self.moe.num_experts_per_token > self.moe.num_experts:
            raise ValueError(
                f"moe_k ({self.moe.num_experts_per_token}) exceeds moe_num_experts ({self.moe.num_experts})"
            )
        return self

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read ``config.json`` of a model folder.

        Raises:
            ConfigError: the file is missing, not JSON, or lacks a needed field (all of them are named).
            UnsupportedError: the architecture is not one of :data:`SUPPORTED_ARCHITECTURES`.
        """
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; expected a model folder with a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds a JSON {type(raw).__name__}; expected an object")
        try:
            return cls.from_json(raw)
        except (ConfigError, UnsupportedError) as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ModelConfig:
        """Translate the fields of a ``config.json`` object; see :meth:`from_folder` for the errors."""
        architecture = _architecture(raw)
        needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        if architecture == "ernie4_5_moe":
            needed += ["moe_intermediate_size"]
        missing = [name for name in needed if raw.get(name) is None]
        if architecture == "ernie4_5_moe":
            missing += [
                f"{name} (or {alias})"
                for name, alias in (("moe_num_experts", "num_experts"), ("moe_k", "num_experts_per_tok"))
                if raw.get(name) is None and raw.get(alias) is None
            ]
        if missing:
            raise ConfigError(f"missing field(s) {', '.join(missing)}; {architecture} needs them")
        try:
            return cls._translate(raw, architecture)
        except ValidationError as error:
            details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
            raise ConfigError(details) from None

    @classmethod
    def _translate(cls, raw: dict[str, Any], architecture: Literal["ernie4_5", "ernie4_5_moe"]) -> ModelConfig:
        heads = raw["num_attention_heads"]
        rope = raw.get("rope_parameters") or {}
        eos = raw.get("eos_token_id", 2)
        fields: dict[str, Any] = {
            "architecture": architecture,
            **{name: raw[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")},
            "num_attention_heads": heads,
            "num_key_value_heads": raw.get("num_key_value_heads") or heads,
            "max_position_embeddings": raw.get("max_position_embeddings", 131072),
            # transformers 5 writes rope_parameters, older files a top-level rope_theta.
            "rope_theta": rope.get("rope_theta") or raw.get("rope_theta") or 500000.0,
            "rms_norm_eps": raw.get("rms_norm_eps", 1e-5),
            "tie_word_embeddings": raw.get("tie_word_embeddings", True),
            "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
            "quantization": raw.get("quantization_config"),
        }
        head_dim = raw.get("head_dim")
        if head_dim is None:
            if not (isinstance(heads, int) and isinstance(raw["hidden_size"], int)) or raw["hidden_size"] % heads:
                raise ConfigError(
                    f"no head_dim, and hidden_size ({raw['hidden_size']}) is not a multiple of "
                    f"num_attention_heads ({heads})"
                )
            head_dim = raw["hidden_size"] // heads
        fields["head_dim"] = head_dim
        if raw.get("use_bias"):
            raise UnsupportedError("use_bias is true; ERNIE-4.5 models without biases are supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(f"hidden_act {raw['hidden_act']!r}; supported: 'silu'")
        rope_type = rope.get("rope_type") or (raw.get("rope_scaling") or {}).get("rope_type") or "default"
        if rope_type != "default":
            raise UnsupportedError(f"rope_type {rope_type!r}; supported: 'default'")
        if architecture == "ernie4_5_moe":
            end = raw.get("moe_layer_end_index", -1)
            fields["moe"] = {
                "num_experts": raw.get("moe_num_experts", raw.get("num_experts")),
                "num_experts_per_token": raw.get("moe_k", raw.get("num_experts_per_tok")),
                "num_shared_experts": raw.get("moe_num_shared_experts") or 0,
                "intermediate_size": raw["moe_intermediate_size"],
                "layer_start_index": raw.get("moe_layer_start_index", 0),
                "layer_end_index": raw["num_hidden_layers"] - 1 if end in (None, -1) else end,
                "layer_interval": raw.get("moe_layer_interval", 1),
                "norm_min": raw.get("moe_norm_min", 1e-12),
            }
        return cls.model_validate(fields)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (from 0) has routed experts."""
        return self.moe is not None and self.moe.is_moe_layer(layer)


def _architecture(raw: dict[str, Any]) -> Literal["ernie4_5", "ernie4_5_moe"]:
    names = raw.get("architectures") or []
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return SUPPORTED_ARCHITECTURES[name]  # type: ignore[return-value]  # values are these literals
    supported = ", ".join(sorted(SUPPORTED_ARCHITECTURES))
    raise UnsupportedError(f"architectures {names!r} is not supported; supported: {supported}")


class EngineConfig(BaseModel):
    """How one engine (one model on one group of ranks) runs. Field names are the field's usual ones.

    ``None`` means "choose for me": ``max_model_len`` from the model, ``dtype`` fp32 on the CPU and bf16 on a GPU,
    ``num_kv_blocks`` from free memory (GPU) or from ``max_num_seqs * max_model_len`` within ``cpu_kv_cache_bytes``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    tensor_parallel_size: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    block_size: int = Field(default=16, ge=1)
    num_kv_blocks: int | None = Field(default=None, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    cpu_kv_cache_bytes: int = Field(default=1 << 30, ge=1)
    kv_cache_dtype: Literal["auto"] = "auto"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    row_order: Literal["plain", "permuted"] | None = None
    """Row order of WINT2 experts (see docs of ``engine.quantization.wint2``); None reads it from the config."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads for tensor work in each rank; None divides the machine's cores by the ranks."""
