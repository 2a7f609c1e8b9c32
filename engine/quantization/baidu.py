"""Baidu's form of ``quantization_config``, as FastDeploy reads it: one dense format, experts by ranges of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError, UnsupportedError
from engine.quantization.bf16 import Bf16
from engine.quantization.format import WeightFormat
from engine.quantization.registry import make_format
from engine.quantization.wint2 import ROW_ORDERS, Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

FORMATS = (Bf16.name, Wint8.name, Wint4.name, Wint2.name)
_SUPPORTED = (
    f"quantization one of wint2, mix_quant, wint8, wint4; dense_quant_type one of {', '.join(FORMATS)}; "
    f"moe_quant_type one of w4w2, {', '.join(FORMATS)}"
)


@dataclass(frozen=True, slots=True)
class Layers:
    """Routed experts of layers ``first`` to ``last`` (inclusive; None: to the last layer) are in ``format``."""

    format: WeightFormat
    first: int
    last: int | None


def read(raw: dict[str, Any]) -> tuple[WeightFormat, list[Layers]]:
    """The format of the dense parts, and those of the routed experts.

    Raises:
        UnsupportedError: a quantization or granularity Dibit does not have; the message lists what it has.
        ConfigError: a malformed field.
    """
    quantization = raw.get("quantization", "mix_quant" if "dense_quant_type" in raw else None)
    if quantization in ("wint8", "wint4"):
        return make_format(quantization), [Layers(make_format(quantization), 0, None)]
    if quantization not in ("wint2", "mix_quant"):
        found = quantization if quantization is not None else raw.get("quant_method")
        raise UnsupportedError(f"quantization {found!r} is not supported; supported: {_SUPPORTED}, or Dibit's own form")
    dense = raw.get("dense_quant_type") or "wint8"
    moe = raw.get("moe_quant_type") or ("w4w2" if quantization == "wint2" else "bf16")
    for key, value in (("dense_quant_type", dense), ("moe_quant_type", moe)):
        if value not in FORMATS and (key, value) != ("moe_quant_type", "w4w2"):
            raise UnsupportedError(f"{key} {value!r} is not supported; supported: {_SUPPORTED}")
    parts = _object(raw, "moe_quant_config")
    w4, w2 = _object(parts, "moe_w4_quant_config"), _object(parts, "moe_w2_quant_config")
    _check_granularity(w2, {"pp_acc"}, group_size=64)
    experts = _layers(w4, w2) if moe == "w4w2" else [Layers(_format(moe, w2), 0, None)]
    return _format(dense, w2), experts


def write(dense: WeightFormat, experts: Sequence[Layers]) -> dict[str, Any] | None:
    """The JSON, or None where this form can't say it."""
    if not {dense.name, *(part.format.name for part in experts)} <= set(FORMATS):
        return None
    match [(part.format, part.first, part.last) for part in experts]:
        case [(Wint8() | Wint4(), 0, None)] if dense.name == experts[0].format.name:
            return {"quantization": dense.name}
        case [(Bf16() | Wint8() | Wint4(), 0, None)] if not isinstance(dense, Wint2):
            return {
                "quantization": "mix_quant",
                "dense_quant_type": dense.name,
                "moe_quant_type": experts[0].format.name,
            }
        case [(Wint4(), w4_first, int(w4_last)), (Wint2(row_order), w2_first, w2_last)]:
            return {
                "dense_quant_type": dense.name,
                "moe_quant_type": "w4w2",
                "quantization": "wint2",
                "moe_quant_config": {
                    "moe_w4_quant_config": {
                        "quant_type": "wint4",
                        "quant_granularity": "per_channel",
                        "quant_start_layer": w4_first,
                        "quant_end_layer": w4_last,
                    },
                    "moe_w2_quant_config": _w2_json(row_order, w2_first, w2_last),
                },
            }
        case [(Wint2(row_order), 0, None)]:
            return {
                "dense_quant_type": dense.name,
                "moe_quant_type": "wint2",
                "quantization": "wint2",
                "moe_quant_config": {"moe_w2_quant_config": _w2_json(row_order, 0, None)},
            }
    return None


def _w2_json(row_order: str | None, first: int, last: int | None) -> dict[str, Any]:
    known = {} if row_order is None else {"row_order": row_order}
    return {
        "quant_type": "wint2",
        "quant_granularity": "pp_acc",
        "quant_group_size": 64,
        "quant_start_layer": first,
        "quant_end_layer": -1 if last is None else last,
        **known,
    }


def _layers(w4: dict[str, Any], w2: dict[str, Any]) -> list[Layers]:
    _check_granularity(w4, {"per_channel"}, group_size=None)
    w4_first, w4_last = _layer(w4, "quant_start_layer", 0), _layer(w4, "quant_end_layer", 6)
    w2_first = _layer(w2, "quant_start_layer", (w4_last or 0) + 1)
    w2_last = _layer(w2, "quant_end_layer", -1)
    names = w4.get("quant_type", "wint4"), w2.get("quant_type", "wint2")
    return [
        Layers(_format(names[0], w2), w4_first or 0, w4_last),
        Layers(_format(names[1], w2), w2_first or 0, w2_last),
    ]


def _format(name: str, w2: dict[str, Any]) -> WeightFormat:
    row_order = w2.get("row_order")
    if row_order is not None and row_order not in ROW_ORDERS:
        raise ConfigError(f"quantization_config: row_order is {row_order!r}; expected one of {', '.join(ROW_ORDERS)}")
    return make_format(name, {"row_order": row_order} if name == Wint2.name else {})


def _layer(part: dict[str, Any], key: str, default: int) -> int | None:
    value = part.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < -1:
        raise ConfigError(f"quantization_config: {key} is {value!r}; expected a layer index, or -1 for the last")
    return None if value == -1 else value


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"quantization_config: {key} is a JSON {type(value).__name__}; expected an object")
    return value


def _check_granularity(part: dict[str, Any], known: set[str], *, group_size: int | None) -> None:
    granularity = part.get("quant_granularity")
    if granularity is not None and granularity not in known:
        raise UnsupportedError(
            f"quant_granularity {granularity!r} of {part.get('quant_type')} is not supported; "
            f"supported: {', '.join(sorted(known))}"
        )
    size = part.get("quant_group_size")
    if group_size is not None and size not in (None, 0, group_size):
        raise UnsupportedError(f"quant_group_size {size!r} is not supported; supported: {group_size}")
