"""Which format each part of each layer gets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.quantization.bf16 import Bf16
from engine.quantization.bitplane import Bitplane
from engine.quantization.config import QuantizationConfig, Rule
from engine.quantization.format import RowOrder, WeightFormat
from engine.quantization.gptq import Gptq
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

Method = Literal["ccq", "bpdq", "gptq", "rtn"]
Dense = Literal["wint8", "wint4", "bf16"]
METHODS: tuple[Method, ...] = get_args(Method)
BITS: dict[Method, tuple[int, ...]] = {"ccq": (2,), "bpdq": (2, 3, 4), "gptq": (2, 4, 8), "rtn": (2, 4, 8)}
"""Bits a weight that each method has, scales not counted."""

_DENSE: dict[Dense, WeightFormat] = {"wint8": Wint8(), "wint4": Wint4(), "bf16": Bf16()}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asks for; the defaults are Baidu's for the 300B, one layer of WINT4 experts instead of four.

    Attributes:
        method: the encoder.
        bits: bits a weight, scales not counted.
        dense: format of attention, dense MLPs and shared experts in a model with routed experts.
        wint4_layers: so many MoE layers, from the first one, keep 4 bits.
        group_size: inputs that share coefficients (bpdq) or a scale (gptq, and rtn of 2 bits).
        nested: bpdq with 4 planes that can be read as 2, 3 or 4.
        row_order: of WINT2 (ccq).
    """

    method: Method = "ccq"
    bits: int = 2
    dense: Dense = "wint8"
    wint4_layers: int = 1
    group_size: int = 64
    nested: bool = False
    row_order: RowOrder = "plain"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.dense not in _DENSE:
            raise ConfigError(f"dense {self.dense!r}; expected one of {', '.join(_DENSE)}")
        if self.bits not in BITS[self.method]:
            found = ", ".join(map(str, BITS[self.method]))
            raise ConfigError(f"{self.method} has no format of {self.bits} bits; it has {found}")
        if self.nested and (self.method, self.bits) != ("bpdq", 4):
            raise ConfigError(
                f"nested is for bpdq with 4 bits, which can then be read as 2, 3 or 4; found {self.method}, {self.bits}"
            )

    @property
    def format(self) -> WeightFormat:
        """What the method writes."""
        match self.method, self.bits:
            case "ccq", _:
                return Wint2(self.row_order)
            case "bpdq", planes:
                return Bitplane(planes, self.group_size, self.nested)
            case "rtn", 8:
                return Wint8()
            case "rtn", 4:
                return Wint4()
        return Gptq(self.bits, self.group_size)

    def plan(self, config: ModelConfig) -> QuantizationConfig:
        """The formats for a model: the method's for the routed experts; for everything where there are none.

        Raises:
            ConfigError: ``wint4_layers`` does not fit the model.
        """
        layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
        if not layers:
            return QuantizationConfig.of(dense=self.format, experts=self.format)
        if not 0 <= self.wint4_layers < len(layers):
            raise ConfigError(
                f"{self.wint4_layers} WINT4 layers in a model with {len(layers)} MoE layers; "
                f"expected 0 to {len(layers) - 1}"
            )
        dense = _DENSE[self.dense]
        if self.wint4_layers == 0 or self.format == Wint4():
            return QuantizationConfig.of(dense=dense, experts=self.format)
        last_w4 = layers[self.wint4_layers - 1]
        return QuantizationConfig.of(
            dense=dense,
            experts=(
                Rule("experts", Wint4(), 0, last_w4),
                Rule("experts", self.format, last_w4 + 1, layers[-1]),
            ),
        )


def two_bit_plan(config: ModelConfig, *, wint4_layers: int = 1, row_order: RowOrder = "plain") -> QuantizationConfig:
    """Baidu's plan: WINT8 for dense linears, WINT4 for the first ``wint4_layers`` MoE layers, WINT2 for the others.

    Raises:
        ConfigError: the model has no routed experts, or not more than ``wint4_layers`` layers of them.
    """
    if config.moe is None:
        raise ConfigError("this plan is for models with routed experts; there are none in this one")
    return Recipe(wint4_layers=wint4_layers, row_order=row_order).plan(config)


def read_plan(path: Path) -> QuantizationConfig:
    """A plan from a JSON file: a ``quantization_config`` as :mod:`engine.quantization.config` describes it.

    Raises:
        ConfigError: the file can't be read, or is not such an object.
        UnsupportedError: it asks for a format that there is not.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(
            f'{path} holds a JSON {type(raw).__name__}; expected {{"quantization": "dibit", "rules": [...]}}'
        )
    return QuantizationConfig.from_json(raw).with_row_order("plain")  # a folder should say what it is in
