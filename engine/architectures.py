"""From a Hugging Face style config.json to the fields of `engine.config.ModelConfig`, architecture by architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.errors import ConfigError, UnsupportedError

Json = dict[str, Any]

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def model_fields(raw: Json) -> Json:
    """The fields of `ModelConfig`; their values are as config.json has them, for `ModelConfig` to check.

    Args:
        raw: the object of a config.json.

    Raises:
        ConfigError: a needed field is missing (all that are missing are named), or one is of the wrong kind.
        UnsupportedError: an architecture, or an option of it, that Dibit doesn't have.
    """
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            architecture, read = ARCHITECTURES[name]
            return {"architecture": architecture, **read(raw)}
    supported = ", ".join(sorted(ARCHITECTURES))
    raise UnsupportedError(f"architectures {names!r} is not supported; supported: {supported}")


def _ernie4_5(raw: Json) -> Json:
    _require(raw, "Ernie4_5", _NEEDED)
    if raw.get("use_bias"):
        raise UnsupportedError("use_bias is true; ERNIE-4.5 models without biases are supported")
    return {
        **_decoder(raw, max_position_embeddings=131072, rope_theta=500000.0, rms_norm_eps=1e-5),
        "rope_interleaved": True,
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "eos_token_ids": _eos_ids(raw, default=(2,)),
    }


def _ernie4_5_moe(raw: Json) -> Json:
    aliases = {"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"}
    _require(raw, "Ernie4_5_Moe", (*_NEEDED, "moe_intermediate_size", *aliases), aliases)
    end = raw.get("moe_layer_end_index", -1)
    moe = {
        "num_experts": raw.get("moe_num_experts", raw.get("num_experts")),
        "num_experts_per_token": raw.get("moe_k", raw.get("num_experts_per_tok")),
        "num_shared_experts": raw.get("moe_num_shared_experts") or 0,
        "intermediate_size": raw["moe_intermediate_size"],
        "layer_start_index": raw.get("moe_layer_start_index", 0),
        "layer_end_index": _integer(raw, "num_hidden_layers") - 1 if end in (None, -1) else end,
        "layer_interval": raw.get("moe_layer_interval", 1),
        "norm_min": raw.get("moe_norm_min", 1e-12),
    }
    return {**_ernie4_5(raw), "moe": moe}


def _qwen2(raw: Json) -> Json:
    """Defaults are those of transformers' Qwen2Config, but for the sizes, which every file has."""
    _require(raw, "Qwen2", _NEEDED)
    sliding = _sliding_layers(raw)
    if sliding:
        raise UnsupportedError(
            f"{len(sliding)} of the layers, from layer {sliding[0]} on, see a sliding window of "
            f"{raw.get('sliding_window')} tokens (use_sliding_window, max_window_layers, layer_types); "
            "supported: full attention in every layer"
        )
    return {
        **_decoder(raw, max_position_embeddings=32768, rope_theta=10000.0, rms_norm_eps=1e-6),
        "rope_interleaved": False,
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "eos_token_ids": _eos_ids(raw, default=()),
    }


ARCHITECTURES: dict[str, tuple[str, Callable[[Json], Json]]] = {
    "Ernie4_5ForCausalLM": ("ernie4_5", _ernie4_5),
    "Ernie4_5_ForCausalLM": ("ernie4_5", _ernie4_5),  # the spelling of early 0.3B uploads
    "Ernie4_5_MoeForCausalLM": ("ernie4_5_moe", _ernie4_5_moe),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
}
"""A name in ``architectures`` of config.json -> (`ModelConfig.architecture`, what reads the other fields)."""


def _require(raw: Json, architecture: str, names: tuple[str, ...], aliases: dict[str, str] | None = None) -> None:
    aliases = aliases or {}
    missing = [
        f"{name} (or {aliases[name]})" if name in aliases else name
        for name in names
        if raw.get(name) is None and raw.get(aliases.get(name, name)) is None
    ]
    if missing:
        raise ConfigError(f"missing field(s) {', '.join(missing)}; {architecture} models need them")


def _decoder(raw: Json, *, max_position_embeddings: int, rope_theta: float, rms_norm_eps: float) -> Json:
    """What every architecture says in the same words; the arguments are the architecture's defaults."""
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"hidden_act {raw['hidden_act']!r}; supported: 'silu'")
    heads = raw["num_attention_heads"]
    return {
        **{name: raw[name] for name in _NEEDED},
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw["head_dim"] if raw.get("head_dim") is not None else _head_dim(raw["hidden_size"], heads),
        "max_position_embeddings": raw.get("max_position_embeddings", max_position_embeddings),
        "rope_theta": _rope_theta(raw) or rope_theta,
        "rms_norm_eps": raw.get("rms_norm_eps", rms_norm_eps),
        "quantization": raw.get("quantization_config"),
    }


def _head_dim(hidden_size: Any, heads: Any) -> int:
    if not (isinstance(heads, int) and isinstance(hidden_size, int)) or heads < 1 or hidden_size % heads:
        raise ConfigError(
            f"no head_dim, and hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({heads})"
        )
    return hidden_size // heads


def _rope_theta(raw: Json) -> Any:
    """``rope_theta`` of ``rope_parameters``, as transformers 5 writes it, else of the file; None without one.

    Raises:
        UnsupportedError: frequencies other than the plain ones (yarn, linear, dynamic, …).
    """
    # Files before transformers 5 have rope_scaling, where the oldest ones call the type "type".
    for name in ("rope_parameters", "rope_scaling"):
        rope = _object(raw, name)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            raise UnsupportedError(f"{name} of type {kind!r}; supported: 'default' (no scaling of positions)")
        if any(isinstance(value, dict) for value in rope.values()):
            raise UnsupportedError(
                f"{name} differs by kind of layer ({', '.join(rope)}); supported: one for all layers"
            )
    return _object(raw, "rope_parameters").get("rope_theta") or raw.get("rope_theta")


def _sliding_layers(raw: Json) -> list[int]:
    """Layers whose attention is not full, by the rule of transformers' Qwen2Config."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise ConfigError(f"layer_types is {kinds!r}; expected a list with an entry for each layer")
        return [layer for layer, kind in enumerate(kinds) if kind != "full_attention"]
    if not raw.get("use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return []
    return list(range(_integer(raw, "max_window_layers", 28), _integer(raw, "num_hidden_layers")))


def _eos_ids(raw: Json, *, default: tuple[int, ...]) -> Any:
    eos = raw.get("eos_token_id")
    return default if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def _integer(raw: Json, name: str, default: int | None = None) -> int:
    value = raw.get(name, default)
    if not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; expected an integer")
    return value


def _object(raw: Json, name: str) -> Json:
    value = raw.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} is {value!r}; expected an object or null")
    return value or {}
