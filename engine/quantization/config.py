"""``quantization_config`` of a model's config.json: which format each group of tensors is in, layer by layer.

The JSON is Baidu's (read by FastDeploy); embedding, lm_head, norms and the router are never quantized.
Dibit adds one key that other readers ignore: ``moe_quant_config.moe_w2_quant_config.row_order``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from engine.errors import ConfigError, UnsupportedError
from engine.quantization.format import RowOrder
from engine.quantization.registry import FORMATS, format_class

ROW_ORDERS = ("plain", "permuted")
_SUPPORTED = (
    f"quantization one of wint2, mix_quant, wint8, wint4; dense_quant_type one of {', '.join(FORMATS)}; "
    f"moe_quant_type one of w4w2, {', '.join(FORMATS)}"
)


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """Routed experts of layers ``first`` to ``last`` (inclusive; None: to the last layer) are in ``format``."""

    format: str
    first: int
    last: int | None


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The format of each group of tensors."""

    dense: str = "bf16"
    """Attention, dense MLPs and shared experts."""
    experts: tuple[LayerFormat, ...] = (LayerFormat("bf16", 0, None),)
    row_order: RowOrder | None = None
    """Row order of the WINT2 experts where the checkpoint says it."""

    @classmethod
    def from_json(cls, raw: dict[str, Any] | None) -> QuantizationConfig:
        """Read a ``quantization_config`` object; None means no quantization.

        Raises:
            UnsupportedError: a quantization or granularity Dibit does not have; the message lists what it has.
            ConfigError: a malformed field.
        """
        if not raw:
            return cls()
        quantization = raw.get("quantization", "mix_quant" if "dense_quant_type" in raw else None)
        if quantization in ("wint8", "wint4"):
            return cls(dense=quantization, experts=(LayerFormat(quantization, 0, None),))
        if quantization not in ("wint2", "mix_quant"):
            found = quantization if quantization is not None else raw.get("quant_method")
            raise UnsupportedError(f"quantization {found!r} is not supported; supported: {_SUPPORTED}")
        dense = raw.get("dense_quant_type") or "wint8"
        moe = raw.get("moe_quant_type") or ("w4w2" if quantization == "wint2" else "bf16")
        for key, value in (("dense_quant_type", dense), ("moe_quant_type", moe)):
            if value not in FORMATS and (key, value) != ("moe_quant_type", "w4w2"):
                raise UnsupportedError(f"{key} {value!r} is not supported; supported: {_SUPPORTED}")
        parts = _object(raw, "moe_quant_config")
        w4, w2 = _object(parts, "moe_w4_quant_config"), _object(parts, "moe_w2_quant_config")
        experts = _layers(w4, w2) if moe == "w4w2" else (LayerFormat(moe, 0, None),)
        _check_granularity(w2, {"pp_acc"}, group_size=64)
        return cls(dense=dense, experts=experts, row_order=_row_order(w2))

    def expert_format(self, layer: int) -> str:
        """The format of the routed experts of decoder layer ``layer`` (from 0, dense layers counted)."""
        for part in self.experts:
            if part.first <= layer and (part.last is None or layer <= part.last):
                return part.format
        ranges = ", ".join(f"{p.format}: {p.first}..{'' if p.last is None else p.last}" for p in self.experts)
        raise ConfigError(f"quantization_config gives no format to the experts of layer {layer}; it has {ranges}")

    def to_json(self) -> dict[str, Any]:
        """The object in Baidu's form, for the w4w2 checkpoints that Dibit writes."""
        w4, w2 = self.experts
        return {
            "dense_quant_type": self.dense,
            "moe_quant_type": "w4w2",
            "quantization": "wint2",
            "moe_quant_config": {
                "moe_w4_quant_config": {
                    "quant_type": w4.format,
                    "quant_granularity": "per_channel",
                    "quant_start_layer": w4.first,
                    "quant_end_layer": w4.last,
                },
                "moe_w2_quant_config": {
                    "quant_type": w2.format,
                    "quant_granularity": "pp_acc",
                    "quant_group_size": 64,
                    "quant_start_layer": w2.first,
                    "quant_end_layer": w2.last,
                    "row_order": self.row_order,
                },
            },
        }


def _layers(w4: dict[str, Any], w2: dict[str, Any]) -> tuple[LayerFormat, ...]:
    _check_granularity(w4, {"per_channel"}, group_size=None)
    w4_first, w4_last = _layer(w4, "quant_start_layer", 0), _layer(w4, "quant_end_layer", 6)
    w2_first = _layer(w2, "quant_start_layer", (w4_last or 0) + 1)
    w2_last = _layer(w2, "quant_end_layer", -1)
    formats = w4.get("quant_type", "wint4"), w2.get("quant_type", "wint2")
    for name in formats:
        format_class(name)
    return (
        LayerFormat(formats[0], w4_first or 0, w4_last),
        LayerFormat(formats[1], w2_first or 0, w2_last),
    )


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


def _row_order(w2: dict[str, Any]) -> RowOrder | None:
    value = w2.get("row_order")
    if value is not None and value not in ROW_ORDERS:
        raise ConfigError(f"quantization_config: row_order is {value!r}; expected one of {', '.join(ROW_ORDERS)}")
    return cast("RowOrder | None", value)
