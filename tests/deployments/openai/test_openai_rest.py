"""Tokenizing, echo with log probabilities, best_of, the small endpoints, and what is counted of unknown fields."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from http_server import MAX_MODEL_LEN, NAME, Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient

from deployments.observer import Observer
from deployments.openai.requests.body import parse
from deployments.openai.requests.chat import ChatRequest
from deployments.openai.requests.completion import CompletionRequest
from deployments.openai.routes import openai_routes
from engine.tokenizer import AddedToken, Tokenizer

pytest_plugins = ("http_fixtures",)

PROMPT = "Once upon a time there was a"


def test_tokenize_a_text(http: httpx.Client, server: Server) -> None:
    found = http.post("/tokenize", json={"model": NAME, "prompt": PROMPT, "return_token_strs": True}).json()
    ids = server.tokenizer.encode(PROMPT)
    assert found["tokens"] == ids
    assert found["count"] == len(ids)
    assert found["max_model_len"] == MAX_MODEL_LEN
    assert "".join(found["token_strs"]).strip() == PROMPT
    assert http.post("/tokenize", json={"prompt": PROMPT}).json()["token_strs"] is None


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_detokenize_is_the_inverse(http: httpx.Client, server: Server, text: str) -> None:
    ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    found = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert found == server.tokenizer.decode(server.tokenizer.encode(text))


def test_tokenize_a_conversation_is_the_prompt_of_the_chat(http: httpx.Client, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    found = http.post("/tokenize", json={"messages": messages}).json()
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)
    assert answer.usage.prompt_tokens == found["count"]
    fewer = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert fewer["count"] < found["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"prompt": "\ud800"}, None),
        ("/tokenize", [], None),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ],
)
def test_mistakes_are_named(http: httpx.Client, path: str, body: Any, param: str | None) -> None:
    response = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert response.json()["error"]["param"] == param


def test_small_endpoints(http: httpx.Client) -> None:
    about = http.get("/tokenizer_info").json()
    assert about["eos_token"] == "</s>"
    assert "messages" in about["chat_template"]
    assert http.get("/ready").status_code == 200
    assert http.get("/version").json()["version"]
    assert http.get(f"/v1/models/{NAME}").json()["max_model_len"] == MAX_MODEL_LEN


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_with_log_probabilities(
    client: openai.OpenAI, server: Server, as_ids: bool, stream: bool, max_tokens: int
) -> None:
    """What lm-evaluation-harness reads: log probabilities of the prompt, and whether it is what greedy would write."""
    ids = server.tokenizer.encode(PROMPT)
    options = {"model": NAME, "prompt": ids if as_ids else PROMPT, "temperature": 0, "seed": 1, "logprobs": 1}
    options |= {"echo": True, "max_tokens": max_tokens, "extra_body": {"ignore_eos": True}}
    if stream:
        text, fields = "", {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chunk in client.completions.create(**options, stream=True):
            text += chunk.choices[0].text
            for name, values in fields.items():
                values.extend(getattr(chunk.choices[0].logprobs, name) if chunk.choices[0].logprobs else [])
    else:
        answer = client.completions.create(**options)
        assert answer.usage.completion_tokens == max_tokens
        text, fields = answer.choices[0].text, answer.choices[0].logprobs.model_dump()
    assert text.startswith(PROMPT)
    assert {len(values) for values in fields.values()} == {len(ids) + max_tokens}
    assert fields["token_logprobs"][0] is None
    assert fields["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in fields["token_logprobs"][1:])
    for token, logprob, top in zip(fields["tokens"], fields["token_logprobs"], fields["top_logprobs"], strict=True):
        assert top is None or top[token] == logprob
    for token, offset in zip(fields["tokens"], fields["text_offset"], strict=True):
        assert text[offset:].startswith(token if offset else token.removeprefix(" "))


def test_log_probabilities_of_a_prompt_are_those_of_generating_it(client: openai.OpenAI, server: Server) -> None:
    ids = server.tokenizer.encode(PROMPT)
    made = client.completions.create(
        model=NAME, prompt=ids, max_tokens=6, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
    ).choices[0]
    continued = server.tokenizer.encode(PROMPT + made.text)
    if continued[: len(ids)] != ids or len(continued) != len(ids) + 6:
        pytest.skip("the text has other tokens when it is tokenized whole")
    read = client.completions.create(model=NAME, prompt=continued, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert read.logprobs.token_logprobs[len(ids) :] == pytest.approx(made.logprobs.token_logprobs, abs=1e-2)


def test_prompt_logprobs_in_vllms_shape(client: openai.OpenAI, server: Server) -> None:
    ids = server.tokenizer.encode(PROMPT)
    extra = {"prompt_logprobs": 2}
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=1, extra_body=extra)
    found = answer.choices[0].model_extra["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == len(ids)
    for token_id, entries in zip(ids[1:], found[1:], strict=True):
        assert len(entries) in (2, 3)
        assert entries[str(token_id)]["logprob"] <= 0
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1, extra_body=extra)
    assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens


def test_the_best_of_several(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": [PROMPT, "The"], "max_tokens": 6, "seed": 5, "extra_body": {"ignore_eos": True}}
    every = client.completions.create(**options, n=4, logprobs=0)
    best = client.completions.create(**options, n=2, best_of=4)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == 2 * 4 * 6
    for prompt in range(2):
        likely = sorted(
            every.choices[4 * prompt : 4 * prompt + 4],
            key=lambda choice: math.fsum(choice.logprobs.token_logprobs),
            reverse=True,
        )
        found = [choice.text for choice in best.choices[2 * prompt : 2 * prompt + 2]]
        assert found == [choice.text for choice in likely[:2]]


class Counting(Observer):
    def __init__(self) -> None:
        self.counts: list[int] = []

    def ignored_fields(self, count: int) -> None:
        self.counts.append(count)


@pytest.fixture
def counted(server: Server) -> Iterator[tuple[TestClient, Counting]]:
    """The routes with an observer and sampling defaults; only requests that end before the engine."""
    observer = Counting()
    routes = openai_routes(server.engine, tokenizer=server.tokenizer, max_body_bytes=10_000, observer=observer)
    with TestClient(Starlette(routes=routes)) as client:
        yield client, observer


def test_unknown_fields_are_counted(counted: tuple[TestClient, Counting]) -> None:
    client, observer = counted
    body = {"model": "other", "prompt": "a", "user": "me", "frobnicate": 1, "x_y": None, "use_beam_search": False}
    assert client.post("/v1/completions", json=body).status_code == 404
    assert observer.counts == [2]
    body = {"model": "other", "messages": [{"role": "user", "content": "a"}], "metadata": {"a": "b"}, "store": True}
    assert client.post("/v1/chat/completions", json=body).status_code == 404
    assert observer.counts == [2, 0]


def test_defaults_of_the_model_are_for_what_a_request_leaves_open(server: Server) -> None:
    defaults = {"temperature": 0.6, "top_p": 0.8}
    chat = parse(ChatRequest, b'{"messages": [{"role": "user", "content": "a"}], "top_p": 1.0}')
    assert chat.sampling_params(defaults, None).temperature == 0.6
    assert chat.sampling_params(defaults, None).top_p == 1.0
    assert parse(CompletionRequest, b'{"prompt": "a"}').sampling_params(defaults, None).max_tokens == 16


def test_template_variables() -> None:
    def variables(**fields: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "a"}], **fields}
        return parse(ChatRequest, json.dumps(body).encode()).template_variables()

    assert variables() == {}
    assert variables(enable_thinking=False) == {"enable_thinking": False}
    assert variables(metadata={"enable_thinking": True}) == {"enable_thinking": True}
    assert variables(metadata={"enable_thinking": "yes"}) == {}
    assert variables(reasoning_effort="none") == {"reasoning_effort": "none", "enable_thinking": False}
    assert variables(chat_template_kwargs={"enable_thinking": True}, enable_thinking=False)["enable_thinking"]


def test_tokens_of_markup_are_text_even_where_they_are_special(server: Server) -> None:
    vocabulary = server.tokenizer._vocabulary
    size = len(vocabulary.pieces)
    added = {
        size: AddedToken("</think>", special=True),
        size + 1: AddedToken("<|secret|>", special=True),
    }
    tokenizer = Tokenizer(vocabulary, added=added)
    assert tokenizer.decode([size, size + 1]) == "</think>"
    assert size not in tokenizer.encode("a </think> b")
