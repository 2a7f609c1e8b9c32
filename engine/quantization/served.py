"""The formats a checkpoint is served in, where its reader has a choice."""

from __future__ import annotations

import dataclasses
from typing import Literal

from engine.errors import ConfigError
from engine.quantization.bf16 import Bf16
from engine.quantization.bitplane import Bitplane
from engine.quantization.config import QuantizationConfig, Rule
from engine.quantization.rounded import Rounded

OnLoad = Literal["wint8", "wint4"]
_BITS: dict[OnLoad, int] = {"wint8": 8, "wint4": 4}


def as_served(stored: QuantizationConfig, *, on_load: OnLoad | None, planes: int | None) -> QuantizationConfig:
    """What ``stored`` becomes in memory.

    Args:
        stored: as the checkpoint's config.json says.
        on_load: round an unquantized checkpoint's linears to integers.
        planes: how many bit planes to read; None: all.

    Raises:
        ConfigError: the checkpoint is quantized already, or has no bit planes.
        UnsupportedError: so many planes can't be read of it.
    """
    rules = stored.rules
    if on_load is not None:
        found = {rule.format.name for rule in rules} - {Bf16.name}
        if found:
            raise ConfigError(
                f"quantization is {on_load!r}, but the checkpoint is quantized already ({', '.join(sorted(found))}); "
                "leave the option out"
            )
        rules = tuple(dataclasses.replace(rule, format=Rounded(_BITS[on_load])) for rule in rules)
    if planes is not None:
        if not any(isinstance(rule.format, Bitplane) for rule in rules):
            raise ConfigError(f"planes is {planes}, but the checkpoint has no bit planes; leave the option out")
        rules = tuple(_read(rule, planes) for rule in rules)
    return QuantizationConfig(rules)


def _read(rule: Rule, planes: int) -> Rule:
    if not isinstance(rule.format, Bitplane):
        return rule
    return dataclasses.replace(rule, format=dataclasses.replace(rule.format, read_planes=planes))
