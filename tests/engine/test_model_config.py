"""config.json of every architecture is read as transformers reads it; what is not supported is named."""

from __future__ import annotations

import json

import pytest
from transformers import Ernie4_5_MoeConfig, Ernie4_5Config, Qwen2Config

from engine.config import ModelConfig
from engine.errors import ConfigError, UnsupportedError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], **SIZES}
ERNIE = {"architectures": ["Ernie4_5ForCausalLM"], **SIZES}
MOE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    **SIZES,
    "moe_intermediate_size": 32,
    "moe_num_experts": 8,
    "moe_k": 2,
}

# config.json of Qwen/Qwen2.5-0.5B-Instruct: written by transformers 4, which is in most repositories.
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_a_repository_of_qwen2_5():
    config = ModelConfig.from_json(QWEN2_5)
    assert config == ModelConfig(
        architecture="qwen2",
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=4864,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_interleaved=False,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        eos_token_ids=(151645,),
    )


@pytest.mark.parametrize(
    ("raw", "theirs"),
    [(QWEN2, Qwen2Config), (ERNIE, Ernie4_5Config), (MOE, Ernie4_5_MoeConfig)],
    ids=["qwen2", "ernie4_5", "ernie4_5_moe"],
)
def test_what_a_file_leaves_out_is_what_transformers_takes(raw, theirs):
    ours, expected = ModelConfig.from_json(raw), theirs(**raw)
    assert ours.rms_norm_eps == expected.rms_norm_eps
    assert ours.max_position_embeddings == expected.max_position_embeddings
    assert ours.tie_word_embeddings == expected.tie_word_embeddings
    assert ours.rope_theta == expected.rope_parameters["rope_theta"]
    eos = expected.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else (eos,))
    assert ours.rope_interleaved == (theirs is not Qwen2Config)


@pytest.mark.parametrize("old", [True, False])
def test_rope_theta_of_old_and_new_files(old):
    rope = {"rope_theta": 1e6} if old else {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert ModelConfig.from_json(QWEN2 | rope | {"rope_scaling": None}).rope_theta == 1e6


def test_several_end_tokens():
    assert ModelConfig.from_json(QWEN2 | {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    "window",
    [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 4,
        },
    ],
)
def test_a_window_over_no_layer_is_none(window):
    assert "sliding_attention" not in Qwen2Config(**QWEN2 | window).layer_types
    ModelConfig.from_json(QWEN2 | window)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "3 of the layers, from layer 1 on, see a sliding window of 8 tokens",
        ),
        (
            {"sliding_window": 8, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
            "1 of the layers, from layer 2 on",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'; supported: 'default'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters of type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "differs by kind of layer"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: 'silu'"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM.*supported: .*Qwen2ForCausalLM"),
        ({"architectures": None}, "supported: "),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(UnsupportedError, match=message):
        ModelConfig.from_json(QWEN2 | change)


def test_biases_of_ernie_are_refused():
    with pytest.raises(UnsupportedError, match="use_bias is true"):
        ModelConfig.from_json(ERNIE | {"use_bias": True})


@pytest.mark.parametrize("raw", [QWEN2, ERNIE, MOE], ids=["qwen2", "ernie4_5", "ernie4_5_moe"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None, "intermediate_size": None}, r"missing field\(s\) vocab_size, intermediate_size; "),
        ({"hidden_size": 66}, r"hidden_size \(66\) is not a multiple of num_attention_heads \(4\)"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": "4 layers"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"rope_theta": "large"}, "rope_theta"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected an object"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
    ],
)
def test_what_is_wrong_is_named(raw, change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(raw | change)


def test_all_that_a_mixture_of_experts_misses_is_named():
    raw = {name: value for name, value in MOE.items() if not name.startswith("moe_")}
    with pytest.raises(
        ConfigError, match=r"moe_intermediate_size, moe_num_experts \(or num_experts\), moe_k \(or num_"
    ):
        ModelConfig.from_json(raw)
    aliased = raw | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    assert ModelConfig.from_json(aliased) == ModelConfig.from_json(MOE)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("{", "is not valid JSON"), ("[]", "holds a JSON list"), ("{}", "architectures")],
)
def test_folders_without_a_config_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises((ConfigError, UnsupportedError), match=message) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_is_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_json(QWEN2_5)
