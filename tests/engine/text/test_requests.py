"""Prompts and parameters become engine requests, or a refusal that names the field."""

import json
import subprocess
import sys

import pytest

from engine.errors import ConfigError, RequestError
from engine.requests import expand
from engine.sampling_params import SamplingParams, default_sampling


def one(prompt, max_model_len=16, used_vocab_size=100, **options):
    return expand(
        prompt, SamplingParams(**options), max_model_len=max_model_len, request_id="r", used_vocab_size=used_vocab_size
    )


def test_max_tokens_is_bounded_by_the_context():
    assert one([1] * 10)[0].max_tokens == 6
    assert one([1] * 10, max_tokens=4)[0].max_tokens == 4
    assert one([1] * 10, max_tokens=400)[0].max_tokens == 6
    assert one([1] * 15)[0].max_tokens == 1


@pytest.mark.parametrize("length", [16, 17, 1000])
def test_a_prompt_that_fills_the_context_is_refused(length):
    with pytest.raises(RequestError, match=f"{length} tokens") as caught:
        one([1] * length)
    assert (caught.value.field, caught.value.code) == ("prompt", "context_length_exceeded")


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([], {}, "prompt"),
        ([1, 100], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias"),
        ([1], {"logit_bias": {-1: 1.0}}, "logit_bias"),
        ([1] * 10, {"min_tokens": 7}, "min_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(prompt, options, field):
    with pytest.raises(RequestError) as caught:
        one(prompt, **options)
    assert caught.value.field == field


def test_choices_have_ids_and_seeds_of_their_own():
    requests = one([1, 2], n=3, seed=5)
    assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2"]
    assert requests[0].params.seed == 5
    assert len({request.params.seed for request in requests}) == 3
    assert all(request.params.n == 1 for request in requests)
    assert [r.params.seed for r in one([1, 2], n=3, seed=5)] == [r.params.seed for r in requests]
    assert one([1], seed=5)[0].request_id == "r"


def test_a_missing_seed_is_drawn():
    seeds = {one([1])[0].params.seed for _ in range(20)}
    assert len(seeds) == 20
    assert None not in seeds
    assert one([1], seed=0)[0].params.seed == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"tempature": 1}, "tempature"),
    ],
)
def test_wrong_parameters_are_refused_by_name(options, field):
    with pytest.raises(RequestError) as caught:
        SamplingParams.parse(**options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, {}),
        ({"eos_token_id": 2, "do_sample": False}, {}),
        ({"temperature": 0.8, "top_p": 0.8, "top_k": None}, {"temperature": 0.8, "top_p": 0.8}),
        ({"top_k": 20, "repetition_penalty": 1.05, "max_length": 9}, {"top_k": 20, "repetition_penalty": 1.05}),
    ],
)
def test_a_models_own_sampling_defaults_are_read(tmp_path, written, expected):
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert default_sampling(tmp_path) == expected
    SamplingParams(**default_sampling(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": -1}', '{"top_k": "many"}', "\xff"])
def test_malformed_sampling_defaults_name_their_file(tmp_path, text):
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        default_sampling(tmp_path)


def test_importing_the_light_parts_does_not_load_torch():
    code = (
        "import sys, engine, engine.config, engine.requests, engine.text, engine.messages; assert 'torch' not in "
        "sys.modules; assert engine.SamplingParams().n == 1; assert 'torch' not in sys.modules; assert not hasattr("
        "engine, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
