"""``quantization_config`` as Baidu writes it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import ConfigError, UnsupportedError
from engine.quantization.config import PARTS, QuantizationConfig, Rule
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

BAIDU_2BITS: dict[str, Any] = {
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "quantization": "wint2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4",
            "quant_granularity": "per_channel",
            "quant_start_layer": 0,
            "quant_end_layer": 6,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2",
            "quant_granularity": "pp_acc",
            "quant_group_size": 64,
            "quant_start_layer": 7,
            "quant_end_layer": 53,
        },
    },
}


def test_the_300b_config_layer_by_layer() -> None:
    config = QuantizationConfig.from_json(BAIDU_2BITS)
    assert config.format("attention", 53) == config.format("mlp", 0) == Wint8()
    assert [config.format("experts", layer).name for layer in (3, 6, 7, 53)] == ["wint4", "wint4", "wint2", "wint2"]
    assert not config.row_order_known, "a file of Baidu does not say its row order"
    assert config.with_row_order("permuted").format("experts", 7) == Wint2("permuted")
    with pytest.raises(ConfigError, match="layer 54"):
        config.format("experts", 54)


def test_no_quantization_is_bf16_everywhere() -> None:
    for raw in (None, {}):
        config = QuantizationConfig.from_json(raw)
        assert {config.format(part, 40).name for part in PARTS} == {"bf16"}


@pytest.mark.parametrize("name", ["wint8", "wint4"])
def test_one_format_for_all(name: str) -> None:
    config = QuantizationConfig.from_json({"quantization": name})
    assert {config.format(part, layer).name for part in PARTS for layer in (0, 53)} == {name}


def test_mixed_formats() -> None:
    raw = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"}
    config = QuantizationConfig.from_json(raw)
    assert (config.format("mlp", 9), config.format("experts", 9)) == (Wint8(), Wint4())


def test_our_json_is_baidus_and_the_row_order() -> None:
    config = QuantizationConfig.of(
        dense=Wint8(), experts=(Rule("experts", Wint4(), 0, 6), Rule("experts", Wint2("plain"), 7, 53))
    )
    written = config.to_json()
    assert QuantizationConfig.from_json(written) == config
    assert written["moe_quant_config"]["moe_w2_quant_config"].pop("row_order") == "plain"
    assert written == BAIDU_2BITS


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quantization": "block_wise_fp8"},
        {"quantization": "wint2", "dense_quant_type": "fp8"},
        {"quantization": "wint2", "moe_quant_type": "w4afp8"},
    ],
)
def test_an_unknown_quantization_lists_what_is_supported(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"not supported; supported: .*wint2.*wint8.*wint4"):
        QuantizationConfig.from_json(raw)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("moe_w2_quant_config", {"quant_granularity": "per_tensor"}, "per_tensor"),
        ("moe_w2_quant_config", {"quant_group_size": 128}, "quant_group_size 128"),
        ("moe_w4_quant_config", {"quant_granularity": "groupwise"}, "groupwise"),
        ("moe_w2_quant_config", {"row_order": "shuffled"}, "row_order is 'shuffled'"),
        ("moe_w4_quant_config", {"quant_end_layer": "six"}, "quant_end_layer is 'six'"),
        ("moe_w4_quant_config", {"quant_type": "wint3"}, "wint3"),
    ],
)
def test_what_a_part_may_say(part: str, change: dict[str, Any], message: str) -> None:
    parts = BAIDU_2BITS["moe_quant_config"] | {part: BAIDU_2BITS["moe_quant_config"][part] | change}
    with pytest.raises((UnsupportedError, ConfigError), match=message):
        QuantizationConfig.from_json(BAIDU_2BITS | {"moe_quant_config": parts})


def test_a_malformed_part_is_named() -> None:
    with pytest.raises(ConfigError, match="moe_quant_config is a JSON list"):
        QuantizationConfig.from_json(BAIDU_2BITS | {"moe_quant_config": [1]})
