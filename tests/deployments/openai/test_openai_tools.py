"""Tools, structure and thoughts with the official client. The small model calls tools because a grammar makes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from http_server import NAME, Server, events

MESSAGES = [{"role": "user", "content": "What is the weather?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Room for the tools in the prompt."""
    server = Server(max_model_len=1024)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"To {name}", "parameters": schema}}


CITY = {"enum": ["Paris", "Rome"]}
TOOLS = [tool("weather", city=CITY, now={"type": "boolean"}), tool("stop", hard={"type": "boolean"})]
NAMED = {"type": "function", "function": {"name": "weather"}}
OPTIONS = {"model": NAME, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 100, "seed": 3, "temperature": 0.7}


def follow(stream: Any) -> tuple[Any, list[dict[str, str]], str]:
    """The message of a stream put together as clients do it: content, calls, finish reason."""
    content, calls, reason = "", [], ""
    for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(calls):
                assert delta.type == "function"
                assert delta.id.startswith("call_")
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            else:
                assert delta.index == len(calls) - 1
                assert (delta.id, delta.type, delta.function.name) == (None, None, None)
            calls[-1]["arguments"] += delta.function.arguments
        reason = choice.finish_reason or reason
    return content, calls, reason


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_with_arguments_of_its_schema(client: openai.OpenAI, stream: bool) -> None:
    options = {**OPTIONS, "tool_choice": NAMED}
    if stream:
        content, calls, reason = follow(client.chat.completions.create(**options, stream=True))
        assert not content
    else:
        (choice,) = client.chat.completions.create(**options).choices
        assert choice.message.content is None
        found = choice.message.tool_calls
        calls = [{"id": c.id, "name": c.function.name, "arguments": c.function.arguments} for c in found]
        reason = choice.finish_reason
    assert reason == "stop"
    assert [call["name"] for call in calls] == ["weather"]
    arguments = json.loads(calls[0]["arguments"])
    assert arguments.keys() == {"city", "now"}
    assert arguments["city"] in CITY["enum"]
    assert isinstance(arguments["now"], bool)


@pytest.mark.parametrize("parallel", [None, False])
def test_required_calls_some_tool(client: openai.OpenAI, parallel: bool | None) -> None:
    more = {} if parallel is None else {"parallel_tool_calls": parallel}
    options = {**OPTIONS, "tool_choice": "required", **more}
    (choice,) = client.chat.completions.create(**options).choices
    calls = choice.message.tool_calls
    assert calls
    if parallel is False:
        assert len(calls) == 1
    if choice.finish_reason != "length":
        assert choice.finish_reason == "tool_calls"
        for call in calls:
            assert call.function.name in ("weather", "stop")
            json.loads(call.function.arguments)
    assert len({call.id for call in calls}) == len(calls)
    _, streamed, reason = follow(client.chat.completions.create(**options, stream=True))
    assert reason == choice.finish_reason
    assert [(call["name"], call["arguments"]) for call in streamed] == [
        (call.function.name, call.function.arguments) for call in calls
    ]


def test_some_tools_may_be_allowed(client: openai.OpenAI) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = client.chat.completions.create(**OPTIONS, tool_choice=choice, parallel_tool_calls=False)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["stop"]


@pytest.mark.parametrize("choice", ["none", "auto", None])
def test_a_model_that_does_not_call_just_answers(client: openai.OpenAI, choice: str | None) -> None:
    more = {} if choice is None else {"tool_choice": choice}
    options = {**OPTIONS, "max_tokens": 8, **more}
    (whole,) = client.chat.completions.create(**options).choices
    assert whole.message.tool_calls is None
    content, calls, _ = follow(client.chat.completions.create(**options, stream=True))
    assert (content, calls) == (whole.message.content, [])


def test_tools_and_results_are_told_to_a_template_without_tools(client: openai.OpenAI, server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    body = {"messages": messages, "tools": TOOLS[:1]}
    ids = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
    text = server.tokenizer.decode(ids)
    assert '"name": "weather"' in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text
    answer = client.chat.completions.create(model=NAME, max_tokens=1, **body)
    assert answer.usage.prompt_tokens == len(ids)
    without = client.chat.completions.create(model=NAME, max_tokens=1, **body, tool_choice="none")
    assert without.usage.prompt_tokens < len(ids)


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
STRICT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
EBNF = 'root ::= "yes" | "no"'


@pytest.mark.parametrize(
    ("field", "value", "texts"),
    [
        ("guided_choice", ["red", "blue"], {"red", "blue"}),
        ("guided_regex", "[ab]c", {"ac", "bc"}),
        ("guided_grammar", EBNF, {"yes", "no"}),
        ("structured_outputs", {"choice": ["red", "blue"]}, {"red", "blue"}),
        ("structured_outputs", {"regex": "[ab]c"}, {"ac", "bc"}),
        ("structured_outputs", {"grammar": EBNF}, {"yes", "no"}),
        ("structural_tag", {"format": {"type": "const_string", "value": "so it is"}}, {"so it is"}),
        ("response_format", {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}, {"x"}),
    ],
)
def test_text_of_a_form(client: openai.OpenAI, field: str, value: Any, texts: set[str]) -> None:
    options = {"model": NAME, "max_tokens": 20, "extra_body": {field: value}}
    chat = client.chat.completions.create(messages=MESSAGES, **options).choices[0]
    assert chat.message.content in texts
    assert chat.finish_reason == "stop"
    assert client.completions.create(prompt="Say", **options).choices[0].text in texts


@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": STRICT},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
def test_json_of_a_schema(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    options = {"model": NAME, "max_tokens": 150, "seed": 1, "temperature": 0.5, "extra_body": extra}
    found = json.loads(client.chat.completions.create(messages=MESSAGES, **options).choices[0].message.content)
    assert found in ({"a": True}, {"a": False})


def test_any_json_object(client: openai.OpenAI) -> None:
    for field in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        options = {"model": NAME, "max_tokens": 24, "seed": 1, "extra_body": field}
        choice = client.chat.completions.create(messages=MESSAGES, **options).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_parsed_answers_of_the_client_library(client: openai.OpenAI) -> None:
    """What ``parse`` sends: strict tools and a strict schema."""
    tools = [{**TOOLS[1], "function": {**TOOLS[1]["function"], "strict": True}}]
    answer = client.chat.completions.parse(
        model=NAME,
        messages=MESSAGES,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
        seed=1,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.parsed_arguments in ({"hard": True}, {"hard": False})


def test_a_tool_or_an_answer_of_a_schema(client: openai.OpenAI) -> None:
    """With tools to choose and a response_format, the answer is one or the other."""
    for seed in range(2):
        answer = client.chat.completions.create(
            **{**OPTIONS, "seed": seed}, parallel_tool_calls=False, extra_body={"response_format": STRICT}
        )
        (choice,) = answer.choices
        if choice.message.tool_calls:
            assert choice.finish_reason in ("tool_calls", "length")
        else:
            assert json.loads(choice.message.content).keys() == {"a"}


def test_log_probabilities_come_with_calls_too(client: openai.OpenAI) -> None:
    options = {**OPTIONS, "tool_choice": NAMED, "logprobs": True}
    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**options, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]


def test_continuous_usage_counts_in_every_chunk(http: httpx.Client) -> None:
    body = {
        "model": NAME,
        "messages": MESSAGES,
        "max_tokens": 6,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    *chunks, last, done = events(http.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 6
