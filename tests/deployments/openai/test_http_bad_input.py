"""What clients get wrong: the right status, an OpenAI error body that names the field, and nothing left half-done."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from http_server import MAX_BODY_BYTES, NAME, Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest_plugins = ("http_fixtures",)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def _nothing_left(server: Server) -> Any:
    yield
    server.wait_until_idle()


def check(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The message of an OpenAI error body with these properties."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code
    assert error["message"]
    return str(error["message"])


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": HELLO, "max_tokens": 4, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": "Hello", "max_tokens": 4, **fields}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(http: httpx.Client, path: str, stream: bool) -> None:
    body = {**chat(), **completion(), "model": "gpt-4", "stream": stream}
    assert "gpt-4" in check(http.post(path, json=body), 404, "model", "model_not_found")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"model": "tiny",}', b"\xff\xfe", b"[" * 100_000, b'{"a": "\xed\xa0\x80"}', b"1" * 9999],
    ids=["empty", "open", "word", "comma", "utf16", "deep", "surrogate", "digits"],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_malformed_json(http: httpx.Client, path: str, body: bytes) -> None:
    check(http.post(path, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_too_many_messages_are_refused_unread(http: httpx.Client, path: str) -> None:
    """While they were read, no other stream would go on."""
    messages = [{"role": "user", "content": ""}] * 8193
    message = check(http.post(path, json={"model": NAME, "messages": messages}), 400, "messages")
    assert "8193 items; at most 8192" in message


@pytest.mark.parametrize("body", ["[]", "null", "3", '"text"', "true"])
def test_json_that_is_no_object(http: httpx.Client, body: str) -> None:
    assert "object" in check(http.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)


SAMPLING_MISTAKES = [
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 2),
    ("presence_penalty", 3),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("n", 0),
    ("n", 10_000),
    ("n", "two"),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2.5),
    ("min_tokens", -1),
    ("min_tokens", 5),
    ("seed", 2**70),
    ("seed", "abc"),
    ("stop", ["x"] * 500),
    ("stop", [""]),
    ("stop", ["a" * 5000]),
    ("stop", 7),
    ("stop", ["a", 1]),
    ("stop_token_ids", "5"),
    ("logit_bias", {"5": 1000}),
    ("logit_bias", {"five": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"99999999": 1}),
    ("logit_bias", [1]),
    ("ignore_eos", "yes"),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("stream_options", 5),
    ("response_format", {"type": "json"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}),
    ("response_format", {"type": "structural_tag", "format": {"type": "nonsense"}}),
    ("structured_outputs", {"regex": "("}),
    ("structured_outputs", {"choice": []}),
    ("guided_json", "{"),
    ("guided_json", {"$ref": "#/nowhere"}),
    ("guided_regex", "("),
    ("guided_choice", []),
    ("guided_grammar", "root ::="),
    ("priority", 2**40),
    ("prompt_logprobs", 21),
    ("audio", {"voice": "alloy"}),
    ("use_beam_search", True),
    ("allowed_token_ids", [5]),
    ("skip_special_tokens", False),
    ("model", 5),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("field", "value"), SAMPLING_MISTAKES)
def test_a_bad_option_is_named(http: httpx.Client, path: str, field: str, value: Any) -> None:
    body = chat() if path == CHAT else completion()
    message = check(http.post(path, json={**body, field: value}), 400, field)
    assert field in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_completion_tokens", 0),
        ("top_logprobs", 5),
        ("logprobs", 5),
        ("tools", [{"type": "custom", "custom": {"name": "f"}}]),
        ("tools", [{"type": "function", "function": {"name": "two words"}}]),
        ("tools", [{"type": "function", "function": {"name": "f"}}] * 2),
        (
            "tools",
            [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}, "strict": True}}],
        ),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {"search_context_size": "low"}),
        ("continue_final_message", True),
        ("chat_template", "{{ messages }}"),
        ("reasoning_max_tokens", 5),
        ("chat_template_kwargs", {"messages": []}),
        ("messages", []),
        ("messages", "Hello"),
        ("messages", None),
    ],
)
def test_a_bad_chat_option_is_named(http: httpx.Client, field: str, value: Any) -> None:
    check(http.post(CHAT, json=chat(**{field: value})), 400, field)


def test_too_many_top_logprobs(http: httpx.Client) -> None:
    check(http.post(CHAT, json=chat(logprobs=True, top_logprobs=21)), 400, "top_logprobs")
    check(http.post(COMPLETIONS, json=completion(logprobs=21)), 400, "logprobs")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "Hi"}, "messages[1].role"),
        ({"role": "wizard", "content": "Hi"}, "messages[1].role"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user"}, "messages[1]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[1].content"),
        ("Hi", "messages[1]"),
        ({"role": "function", "name": "f", "content": "1"}, "messages[1].role"),
        ({"role": "assistant", "content": "", "audio": {"id": "x"}}, "messages[1]"),
        ({"role": "user", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, "messages[1]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "messages[1].tool_calls"),
    ],
)
def test_a_bad_message_is_named(http: httpx.Client, message: Any, param: str) -> None:
    check(http.post(CHAT, json=chat(messages=[*HELLO, message])), 400, param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []),
        ("prompt", ""),
        ("prompt", None),
        ("prompt", 5),
        ("prompt", ["a", 5]),
        ("prompt", [5, "a"]),
        ("prompt", [[]]),
        ("prompt", [[1, 2], []]),
        ("prompt", [-1]),
        ("prompt", [10**9]),
        ("prompt", [10**30]),
        ("prompt", [1.5]),
        ("prompt", ["a"] * 2000),
        ("suffix", "the end"),
        ("best_of", 0),
        ("best_of", 1000),
        ("logprobs", -1),
        ("logprobs", "many"),
        ("echo", "yes"),
    ],
)
def test_a_bad_completion_option_is_named(http: httpx.Client, field: str, value: Any) -> None:
    check(http.post(COMPLETIONS, json=completion(**{field: value})), 400, field)


def test_contradictions(http: httpx.Client) -> None:
    check(http.post(COMPLETIONS, json=completion(n=3, best_of=2)), 400, "best_of")
    check(http.post(COMPLETIONS, json=completion(best_of=2, stream=True)), 400, "best_of")
    check(http.post(COMPLETIONS, json=completion(prompt_logprobs=1, stream=True)), 400, "prompt_logprobs")
    both = {"response_format": {"type": "json_object"}, "guided_regex": "a+"}
    assert "several" in check(http.post(CHAT, json=chat(**both)), 400, "guided_regex")
    tools = [{"type": "function", "function": {"name": "f"}}]
    named = {"type": "function", "function": {"name": "g"}}
    assert "'g'" in check(http.post(CHAT, json=chat(tools=tools, tool_choice=named)), 400, "tool_choice")


def test_missing_fields(http: httpx.Client) -> None:
    check(http.post(CHAT, json={"model": NAME}), 400, "messages")
    check(http.post(COMPLETIONS, json={"model": NAME}), 400, "prompt")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_numbers_that_are_none(http: httpx.Client, path: str, literal: str) -> None:
    body = json.dumps(chat() if path == CHAT else completion())[:-1] + f', "temperature": {literal}}}'
    check(http.post(path, content=body, headers={"content-type": "application/json"}), 400, "temperature")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_half_a_surrogate_pair(http: httpx.Client, path: str) -> None:
    body = json.dumps(chat() if path == CHAT else completion()).replace("Hello", "Hel\\ud800lo")
    check(http.post(path, content=body, headers={"content-type": "application/json"}), 400)
    whole = body.replace("\\ud800", "\\ud83d\\ude00")
    assert http.post(path, content=whole, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_too_long_for_the_context(http: httpx.Client, stream: bool) -> None:
    long = "A word and another word. " * 400
    messages = [{"role": "user", "content": long}]
    check(http.post(CHAT, json=chat(messages=messages, stream=stream)), 400, "messages", "context_length_exceeded")
    check(
        http.post(COMPLETIONS, json=completion(prompt=["short", long], stream=stream)),
        400,
        "prompt",
        "context_length_exceeded",
    )


def test_unknown_fields_and_nulls_are_ignored(http: httpx.Client) -> None:
    fields = {"user": "me", "metadata": {"a": 1}, "frobnicate": [1, {"b": None}], "store": True}
    nulls = dict.fromkeys(["temperature", "top_p", "n", "stop", "logit_bias", "seed", "stream", "stream_options"])
    assert http.post(CHAT, json=chat(**fields, **nulls)).status_code == 200
    assert http.post(COMPLETIONS, json=completion(**fields, **nulls)).status_code == 200
    assert http.post(CHAT, json={"messages": HELLO, "max_tokens": 2.0}).status_code == 200


def test_a_large_body_is_refused_while_it_is_read(http: httpx.Client, server: Server) -> None:
    body = json.dumps(completion(prompt="x" * (MAX_BODY_BYTES + 1)))
    check(http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 413)

    def pieces() -> Any:  # without a declared length
        for _ in range(64):
            yield b"x" * (MAX_BODY_BYTES // 16)

    check(http.post(COMPLETIONS, content=pieces(), headers={"content-type": "application/json"}), 413)
    # The answer to a declared length that is too large comes before any of the body.
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 20000000\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]
    assert http.post(COMPLETIONS, json=completion(prompt="x " * 20, max_tokens=1)).status_code == 200


def test_other_methods_paths_and_types(http: httpx.Client) -> None:
    check(http.get(CHAT), 405)
    check(http.delete("/v1/models"), 405)
    check(http.get("/v1/nothing"), 404)
    check(http.post("/"), 404)
    check(http.post(CHAT, data={"model": NAME}), 415)
    check(http.post(CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"}), 415)
    allowed = {"content-type": "application/json; charset=utf-8"}
    assert http.post(CHAT, content=json.dumps(chat()), headers=allowed).status_code == 200


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted(
    {field for field, _ in SAMPLING_MISTAKES} | {"messages", "prompt", "logprobs", "top_logprobs", "echo", "best_of"}
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([CHAT, COMPLETIONS]), fields=st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3))
def test_whatever_a_client_sends_is_answered_or_refused(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    base = chat() if path == CHAT else completion()
    body = json.dumps({**base, **fields})
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
