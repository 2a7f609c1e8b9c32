"""The weight formats there are, by the name ``quantization_config`` uses."""

from __future__ import annotations

from engine.errors import UnsupportedError
from engine.quantization.bf16 import Bf16
from engine.quantization.format import WeightFormat
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

FORMATS: dict[str, type[WeightFormat]] = {cls.name: cls for cls in (Bf16, Wint8, Wint4, Wint2)}


def format_class(name: str) -> type[WeightFormat]:
    """The class of a format. Raises UnsupportedError, which lists the formats, if there is none of that name."""
    try:
        return FORMATS[name]
    except KeyError:
        raise UnsupportedError(f"weight format {name!r} is not supported; supported: {', '.join(FORMATS)}") from None
