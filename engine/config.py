"""What a model is (read from its config.json) and how an engine runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.architectures import model_fields
from engine.errors import ConfigError, UnsupportedError


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

    architecture: Literal["ernie4_5", "ernie4_5_moe", "qwen2"]
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    intermediate_size: int = Field(ge=1)
    max_position_embeddings: int = Field(ge=1)
    rope_theta: float = Field(gt=0)
    rope_interleaved: bool = True
    """Whether features (2i, 2i + 1) of a head turn together, rather than (i, i + head_dim / 2); see ``ops.rotary``."""
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
            UnsupportedError: an architecture, or an option of one, that :mod:`engine.architectures` doesn't read.
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
        fields = model_fields(raw)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
            raise ConfigError(details) from None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (from 0) has routed experts."""
        return self.moe is not None and self.moe.is_moe_layer(layer)


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
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """Of keys and values: "auto" keeps them in ``dtype``, "int8" rounds them, with a scale for each token and kv head;
    the cache then holds nearly twice the tokens of bf16."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    quantization: Literal["wint8", "wint4"] | None = None
    """Round an unquantized checkpoint's linears to integers while loading; None takes it as it is."""
    quantize_embeddings: Literal["int8", "int4"] | None = None
    """Round token embedding and logits head while loading: "int8" with a scale a token, "int4" with a scale and a zero
    point for each 128 features (``engine.quantization.vocabulary``); None keeps them in ``dtype``."""
    planes: Literal[2, 3, 4] | None = None
    """How many bit planes to read of a nested checkpoint (``engine.quantization.bitplane``); None reads all."""
    row_order: Literal["auto", "plain", "permuted"] = "auto"
    """Row order of WINT2 weights, where config.json does not say it; "auto" finds out (``engine.row_order``)."""
    row_order_reference: str | None = None
    """A folder with the same model unquantized, from which "auto" can tell the row order at once."""
    expert_load: bool = False
    """Count the tokens that go to each routed expert, for the metrics and the page (``engine.execution.experts``)."""
    enforce_eager: bool = False
    """On a GPU, launch every kernel of a decode step by itself instead of replaying a CUDA graph of them all."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads for tensor work in each rank; None divides the machine's cores by the ranks."""
