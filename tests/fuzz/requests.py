"""Requests that no client should send: valid ones, broken in every place from the fields of the body to its bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from deployments.openai.schema import OPERATIONS
from tests.fuzz.asgi import JSON, Headers


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Headers = field(default=(JSON,))
    body: bytes = b""
    pieces: int = 1
    query: bytes = b""


BODIES = {operation.path: operation.bodies for operation in OPERATIONS if operation.bodies}
"""The models behind the paths that take a body."""
PATHS = ["/v1/chat/completions", "/v1/completions", *BODIES]


def _sometimes(values: Sequence[Any], of: int) -> st.SearchStrategy[Any]:
    """One of ``values`` as often as they are many among ``of``, else None. Integers would favour their ends."""
    return st.sampled_from([None] * (of - len(values)) + list(values))


def _rarely(of: int) -> st.SearchStrategy[Any]:
    return _sometimes([True], of)


numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2, 20, 255, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")]),
)
texts = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Co", "Cn", "Cc", "Mn", "So"]), max_size=8),
    st.sampled_from(
        ["", "\0", "\ud800", "\udfff\ud800", "﷽" * 50, "a" * 3000, "\r\n\r\n", "<|im_end|>", "\N{BOM}", "{{7*7}}"]
    ),
)
words = st.sampled_from(["Hello", "", "\u00e9\u0301 \U0001f600", "a b" * 20]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=8
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=5,
)

_calls = st.lists(
    st.fixed_dictionaries(
        {
            "id": words,
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": words, "arguments": st.sampled_from(["{}", "[", "null", '{"a":1}']) | words}
            ),
        }
    ),
    max_size=2,
)
_content = words | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words}), max_size=3)


def _message(*roles: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"role": st.sampled_from(roles), "content": _content}, optional={"name": words, "tool_call_id": words}
    )


def _assistant() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={"content": _content | st.none(), "reasoning_content": words, "tool_calls": _calls},
    )


# Fields whose names alone would be refused with nearly any value: something that may pass, so that what is behind the
# first check is met too.
_LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["tiny", "tiny", "tiny", "gpt-4"]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "n": st.integers(1, 4),
    "best_of": st.integers(1, 4),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 50),
    "min_p": st.floats(0, 1),
    "max_tokens": st.integers(1, 8),
    "max_completion_tokens": st.integers(1, 8),
    "min_tokens": st.integers(0, 3),
    "stop": words | st.lists(words, max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 500), max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logprobs": st.booleans() | st.integers(0, 6),
    "top_logprobs": st.integers(0, 6),
    "prompt_logprobs": st.integers(0, 3),
    "echo": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, 500).map(str), st.floats(-100, 100), max_size=4),
    "prompt": words
    | st.lists(words, max_size=3)
    | st.lists(st.integers(0, 500), max_size=9)
    | st.lists(st.lists(st.integers(-2, 10**9), max_size=3), max_size=3),
    "messages": st.lists(
        _message("user") | _message("user") | _message("system", "developer", "tool", "function") | _assistant(),
        min_size=1,
        max_size=4,
    ),
    "tools": st.lists(
        st.fixed_dictionaries(
            {
                "type": st.just("function"),
                "function": st.fixed_dictionaries(
                    {"name": st.sampled_from(["f", "g", "get_weather"]) | words},
                    optional={
                        "description": words,
                        "strict": st.booleans(),
                        "parameters": st.sampled_from(
                            [
                                {},
                                {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
                                {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
                                {"type": "object", "properties": {"a": {"pattern": "(["}}},
                            ]
                        )
                        | anything,
                    },
                ),
            }
        ),
        max_size=3,
    ),
    "tool_choice": st.sampled_from(
        ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}, {"type": "function"}]
    ),
    "parallel_tool_calls": st.booleans(),
    "response_format": st.sampled_from(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
            {"type": "json_schema"},
            {"type": "yaml"},
        ]
    ),
    "guided_regex": st.sampled_from(["[a-z]+", "(", "(a|b)*", "a{1000000}", "(?=x)"]),
    "guided_choice": st.lists(words, max_size=3),
    "guided_json": st.sampled_from([{}, {"type": "integer"}, {"type": "nothing"}, "{", {"enum": []}]),
    "guided_grammar": st.sampled_from(['root ::= "a"', "root ::=", "root ::= root", ""]),
    "structured_outputs": st.sampled_from([{"regex": "a+"}, {"choice": ["a", "b"]}, {"json": {}}, {"a": 1}]),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["enable_thinking", "tools", "x", "self"]), anything, max_size=2
    ),
    "priority": st.integers(-5, 5),
    "tokens": st.lists(st.integers(-1, 2000), max_size=8),
}
_REQUIRED = ("messages", "prompt", "tokens")


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """The body of a request for ``path``: some likely fields, some unlikely ones, and now and then broken bytes."""
    model = draw(st.sampled_from(BODIES[path]))
    names = sorted({info.alias or name for name, info in model.model_fields.items()})
    required = [name for name in _REQUIRED if name in names]
    likely = draw(st.lists(st.sampled_from([name for name in names if name in _LIKELY]), max_size=5, unique=True))
    body: dict[str, Any] = {name: draw(_LIKELY[name]) for name in {*required, *likely}}
    if "max_tokens" in names:
        body.setdefault("max_tokens", 4)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        name = draw(st.sampled_from(names) | texts)
        body[name] = draw(anything)
    if draw(_rarely(15)) and body:
        del body[draw(st.sampled_from(sorted(body)))]
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    if draw(_rarely(40)):
        depth = draw(st.sampled_from([10, 150, 1000, 100_000]))
        nested = draw(st.sampled_from(["[", '{"a":'])) * depth
        text = text[:-1] + f', "{draw(st.sampled_from(names))}": {nested}'
        if draw(st.booleans()):
            text += "".join("]" if c == "[" else "}" for c in reversed(nested) if c in "[{") + "}"
    return draw(_broken(text.encode("utf-8", "surrogatepass")))


@st.composite
def _broken(draw: st.DrawFn, data: bytes) -> bytes:
    kind = draw(_sometimes(range(9), 40))
    place = draw(st.integers(0, max(len(data), 1)))
    match kind:
        case 0:
            return data[:place]
        case 1:
            return data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
        case 2:
            return data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place + 4 :]
        case 3:
            return b"\xef\xbb\xbf" + data
        case 4:
            return data.decode("utf-8", "replace").encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-16-le"])))
        case 5:
            return draw(st.binary(max_size=200))
        case 6:
            return data + data
        case 7:
            return data[:-1] + b"," + data[1:]  # every key twice
        case 8:
            return draw(anything.map(lambda value: json.dumps(value).encode()))
        case _:
            return data


_values = st.one_of(
    st.binary(max_size=30).filter(lambda value: not set(value) & set(b"\r\n\0")),
    st.sampled_from([b"", b" ", b"\xff", b"9" * 5000, b"-1", b"1e9", b"\xb2", b"a" * 10_000, b"Bearer sk-dibit-x"]),
)
_headers = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"content-type",
                b"content-length",
                b"authorization",
                b"x-request-id",
                b"origin",
                b"host",
                b"accept",
                b"accept-encoding",
                b"content-encoding",
                b"transfer-encoding",
                b"expect",
                b"cookie",
                b"range",
                b"x-forwarded-for",
                b"access-control-request-method",
                b"access-control-request-headers",
                b"serve_multiplexed_model_id",
                b"traceparent",
            ]
        ),
        _values,
    ),
    max_size=3,
)
_types = st.sampled_from(
    [b"application/json"] * 24
    + [
        b"",
        b"application/json; charset=utf-16",
        b"APPLICATION/JSON;",
        b"application/vnd.x+json",
        b"text/plain",
        b"multipart/form-data; boundary=x",
        b"application/x-www-form-urlencoded",
        b"\xff",
    ]
)
_paths = st.one_of(
    st.sampled_from(sorted(operation.path for operation in OPERATIONS)),
    st.text(max_size=20).map(lambda text: "/" + text),
    st.text(max_size=20).map(lambda text: "/v1/models/" + text),
    st.sampled_from(
        ["/", "", "//", "/v1", "/v1/../health", "/health/", "/v1/models/" + "x" * 3000, "/%00", "/openapi.json"]
    ),
)
_methods = st.sampled_from(
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "FROB", "get"]
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Mostly a POST with a body of some sort; now and then another method, path or header."""
    usual = not draw(_rarely(12))
    path = draw(st.sampled_from(PATHS))
    body = draw(bodies(path))
    headers = [(b"content-type", draw(_types))]
    if draw(_rarely(4)):
        headers += draw(_headers)
    return Request(
        method="POST" if usual else draw(_methods),
        path=path if usual else draw(_paths),
        headers=headers,
        body=body,
        pieces=draw(st.sampled_from([1, 1, 1, 2, 7])),
        query=b"" if usual else draw(st.binary(max_size=20)),
    )
