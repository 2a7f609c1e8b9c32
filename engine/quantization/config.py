"""``quantization_config`` of a model's config.json: which format each group of matrices is in, layer by layer.

Embedding, lm_head, norms and the router are never quantized. There are two forms of the JSON. Baidu's (read by
FastDeploy) is read as it is, and written wherever it can say what is meant; Dibit adds one key to it that other readers
ignore, ``moe_quant_config.moe_w2_quant_config.row_order``. What Baidu's form has no words for stands in Dibit's own::

    {"quantization": "dibit", "rules": [
      {"part": "attention", "first_layer": 0, "last_layer": null, "format": "wint8"},
      {"part": "experts", "first_layer": 3, "last_layer": 53, "format": "wint2", "row_order": "plain"}, ...]}

Every part of every layer that has it must be covered; the first rule that covers it counts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from engine.errors import ConfigError
from engine.quantization import baidu
from engine.quantization.bf16 import Bf16
from engine.quantization.format import RowOrder, WeightFormat
from engine.quantization.registry import format_options, make_format
from engine.quantization.wint2 import Wint2

Part = Literal["attention", "mlp", "shared_experts", "experts"]
"""Groups of matrices: qkv_proj and o_proj; the MLP of dense layers; shared experts; routed experts."""
PARTS: tuple[Part, ...] = get_args(Part)
DENSE_PARTS: tuple[Part, ...] = ("attention", "mlp", "shared_experts")


@dataclass(frozen=True, slots=True)
class Rule:
    """``part`` of layers ``first`` to ``last`` (inclusive; None: to the last layer) is in ``format``."""

    part: Part
    format: WeightFormat
    first: int = 0
    last: int | None = None


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The format of each group of matrices in each layer."""

    rules: tuple[Rule, ...] = tuple(Rule(part, Bf16()) for part in PARTS)

    @classmethod
    def of(cls, *, dense: WeightFormat, experts: WeightFormat | tuple[Rule, ...]) -> QuantizationConfig:
        """One format for everything but the routed experts, and one (or rules) for these."""
        rules = experts if isinstance(experts, tuple) else (Rule("experts", experts),)
        return cls((*(Rule(part, dense) for part in DENSE_PARTS), *rules))

    @classmethod
    def from_json(cls, raw: dict[str, Any] | None) -> QuantizationConfig:
        """Read a ``quantization_config`` object; None means no quantization.

        Raises:
            UnsupportedError: a quantization or granularity Dibit does not have; the message lists what it has.
            ConfigError: a malformed field.
        """
        if not raw:
            return cls()
        if raw.get("quantization") == "dibit":
            return cls(_rules(raw))
        dense, experts = baidu.read(raw)
        return cls.of(
            dense=dense, experts=tuple(Rule("experts", part.format, part.first, part.last) for part in experts)
        )

    def to_json(self) -> dict[str, Any]:
        """The object, in Baidu's form where that can say it."""
        dense = {rule.format for rule in self.rules if rule.part != "experts" and (rule.first, rule.last) == (0, None)}
        experts = [rule for rule in self.rules if rule.part == "experts"]
        if len(dense) == 1 and len(self.rules) == len(DENSE_PARTS) + len(experts):
            layers = [baidu.Layers(rule.format, rule.first, rule.last) for rule in experts]
            written = baidu.write(dense.pop(), layers)
            if written is not None:
                return written
        return {"quantization": "dibit", "rules": [_rule_to_json(rule) for rule in self.rules]}

    def format(self, part: Part, layer: int) -> WeightFormat:
        """The format of ``part`` in decoder layer ``layer`` (from 0, dense layers counted).

        Raises:
            ConfigError: no rule covers it.
        """
        for rule in self.rules:
            if rule.part == part and rule.first <= layer and (rule.last is None or layer <= rule.last):
                return rule.format
        ranges = ", ".join(
            f"{rule.format.name}: {rule.first}..{'' if rule.last is None else rule.last}"
            for rule in self.rules
            if rule.part == part
        )
        raise ConfigError(f"quantization_config gives no format to {part} of layer {layer}; it has {ranges or 'none'}")

    def with_row_order(self, row_order: RowOrder) -> QuantizationConfig:
        """The same, WINT2 matrices of unknown row order being in ``row_order``."""
        return QuantizationConfig(
            tuple(
                dataclasses.replace(rule, format=dataclasses.replace(rule.format, row_order=row_order))
                if isinstance(rule.format, Wint2) and rule.format.row_order is None
                else rule
                for rule in self.rules
            )
        )

    @property
    def row_order_known(self) -> bool:
        """Whether there is no WINT2 matrix of unknown row order."""
        return all(rule.format.row_order is not None for rule in self.rules if isinstance(rule.format, Wint2))


def _rules(raw: dict[str, Any]) -> tuple[Rule, ...]:
    rules = raw.get("rules")
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ConfigError(f"quantization_config: rules is {rules!r:.80}; expected a list of objects")
    return tuple(_rule(dict(rule)) for rule in rules)


def _rule(raw: dict[str, Any]) -> Rule:
    part, name = raw.pop("part", None), raw.pop("format", None)
    if part not in PARTS:
        raise ConfigError(f"quantization_config: part is {part!r}; expected one of {', '.join(PARTS)}")
    first, last = raw.pop("first_layer", 0), raw.pop("last_layer", None)
    for layer in (first, 0 if last is None else last):
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise ConfigError(f"quantization_config: {layer!r} is not a layer index (in a rule for {part})")
    return Rule(cast("Part", part), make_format(str(name), raw), first, last)


def _rule_to_json(rule: Rule) -> dict[str, Any]:
    return {
        "part": rule.part,
        "first_layer": rule.first,
        "last_layer": rule.last,
        "format": rule.format.name,
        **format_options(rule.format),
    }
