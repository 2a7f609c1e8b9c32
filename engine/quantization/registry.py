"""The weight formats there are, by the name ``quantization_config`` uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from engine.errors import ConfigError, UnsupportedError
from engine.quantization.bf16 import Bf16
from engine.quantization.bitplane import Bitplane
from engine.quantization.format import WeightFormat
from engine.quantization.gptq import Gptq
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

FORMATS: dict[str, type[WeightFormat]] = {cls.name: cls for cls in (Bf16, Wint8, Wint4, Wint2, Bitplane, Gptq)}


def make_format(name: str, options: Mapping[str, Any] | None = None) -> WeightFormat:
    """A format from its name and its options, as they stand in JSON.

    Raises:
        UnsupportedError: there is none of that name (the message lists those there are), or it can't do a value.
        ConfigError: it has no option of that name, or a value is of the wrong type.
    """
    if name not in FORMATS:
        raise UnsupportedError(f"weight format {name!r} is not supported; supported: {', '.join(FORMATS)}")
    cls = FORMATS[name]
    known = option_names(cls)
    for option in options or {}:
        if option not in known:
            raise ConfigError(f"weight format {name} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    return cls(**(options or {}))


def format_options(weight_format: WeightFormat) -> dict[str, Any]:
    """The options of a format for JSON; ``make_format(f.name, format_options(f)) == f``, choices at run time apart."""
    return {name: getattr(weight_format, name) for name in option_names(type(weight_format))}


def option_names(cls: type[WeightFormat]) -> list[str]:
    """The names of a format's options; its keyword-only fields (dtype, planes to read) are choices of the reader."""
    return [field.name for field in fields(cls) if not field.kw_only]
