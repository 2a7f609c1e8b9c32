"""Thoughts and tool calls in text that comes in pieces: however it is cut, what is found is the same."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.openai.calls import HERMES, CallParser
from deployments.openai.markers import partial_length
from deployments.openai.parts import CallArguments, CallBegins, Content, Part, Thought
from deployments.openai.reasoning import Thinking, ThoughtParser
from deployments.openai.shape import MessageParser

Found = tuple[str, str, list[tuple[str, str]]]


def read(pieces: list[str], *, thinking: bool = False, begun: bool = False, parallel: bool = True) -> Found:
    """Thoughts, content, and (name, arguments) of each call."""
    thoughts = ThoughtParser(Thinking(response=True), begun=begun) if thinking else None
    parser = MessageParser(thoughts, CallParser(HERMES, parallel=parallel))
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push(piece, last=False)
    parts += parser.push("", last=True)
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    content = "".join(part.text for part in parts if isinstance(part, Content))
    begins = [part for part in parts if isinstance(part, CallBegins)]
    assert [part.index for part in begins] == list(range(len(begins)))
    calls = [[part.name, ""] for part in begins]
    begun_calls = 0
    for part in parts:
        if isinstance(part, CallBegins):
            begun_calls += 1
        if isinstance(part, CallArguments):
            assert part.index == begun_calls - 1, "arguments of a call that hasn't begun, or isn't the last"
            calls[part.index][1] += part.text
    return thought, content, [(name, arguments) for name, arguments in calls]


def call(name: str, arguments: object, *, space: str = "\n") -> str:
    return f"<tool_call>{space}{json.dumps({'name': name, 'arguments': arguments})}{space}</tool_call>"


WEATHER = call("get_weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("just text\n", "just text\n", []),
        (WEATHER, "", [("get_weather", '{"city": "Paris"}')]),
        (f"Let me see.\n\n{WEATHER}\n", "Let me see.", [("get_weather", '{"city": "Paris"}')]),
        (f"{WEATHER}\n{call('f', {})}", "", [("get_weather", '{"city": "Paris"}'), ("f", "{}")]),
        (f"{WEATHER} and then", "and then", [("get_weather", '{"city": "Paris"}')]),
        # what models get wrong
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"arguments": {"a": [1, {"b": "}"}]}, "name": "f"}', "", [("f", '{"a": [1, {"b": "}"}]}')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>tail', "tail", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),
        ("<tool_call>\nnothing of the kind</tool_call>", "<tool_call>\nnothing of the kind</tool_call>", []),
        ('<tool_call>{"name": 5}', '<tool_call>{"name": 5}', []),
        ('<tool_call>{"city": "Paris"}', '<tool_call>{"city": "Paris"}', []),
        ("a <tool_cal", "a <tool_cal", []),
        ("<tool_call>", "<tool_call>", []),
        (
            call("f", {"text": 'a </tool_call> in "quotes" \\ <tool_call>'}),
            "",
            [("f", json.dumps({"text": 'a </tool_call> in "quotes" \\ <tool_call>'}))],
        ),
    ],
)
def test_calls_are_found(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read([text]) == ("", content, calls)
    assert read(list(text)) == ("", content, calls)


@pytest.mark.parametrize(
    ("text", "begun", "thought", "content"),
    [
        ("<think>\nhm\n\nwell\n</think>\n\nHello", False, "hm\n\nwell", "Hello"),
        ("hm</think>Hello", True, "hm", "Hello"),
        ("hm\n</think>\n\n\n<response>\nHello\n</response>\n", True, "hm", "Hello"),
        ("hm\n</think>\n\n\n" + WEATHER, True, "hm", ""),
        ("no thoughts, </think> or not", False, "", "no thoughts, </think> or not"),
        ("\n\nHello", False, "", "\n\nHello"),
        ("<thin", False, "", "<thin"),
        ("cut off <", True, "cut off <", ""),
        ("a</think>\n<resp", True, "a", "<resp"),
        ("", True, "", ""),
    ],
)
def test_thoughts_are_told_from_the_answer(text: str, begun: bool, thought: str, content: str) -> None:
    for pieces in ([text], list(text)):
        found = read(pieces, thinking=True, begun=begun)
        assert found[:2] == (thought, content)


def test_arguments_are_passed_on_while_they_are_written() -> None:
    parser = CallParser(HERMES, parallel=True)
    parts = parser.push('<tool_call>\n{"name": "f", "arguments": {"city": "Par')
    assert parts == [CallBegins(0, "f"), CallArguments(0, '{"city": "Par')]
    assert parser.push("is") == [CallArguments(0, "is")]


def test_without_parallel_calls_the_first_is_the_only_one() -> None:
    text = f"{call('f', {})}\n{call('g', {})}"
    assert read([text], parallel=False) == ("", "", [("f", "{}")])
    assert read(list(text), parallel=False)[2] == [("f", "{}")]


MARKERS = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", WEATHER]
bits = st.sampled_from(
    [
        *MARKERS,
        "\n",
        " ",
        "<",
        "</",
        '{"name": "f", ',
        '"arguments": {',
        '"a": "b\\"',
        "}",
        '"',
        ",",
        "word",
        "é",
        "[",
        "]",
        ":",
        "1",
    ]
)
texts = st.lists(bits | st.text(max_size=3), max_size=14).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=12), begun=st.booleans(), parallel=st.booleans())
def test_how_a_text_is_cut_makes_no_difference(text: str, cuts: list[int], begun: bool, parallel: bool) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(ends)]
    for thinking in (False, True):
        whole = read([text], thinking=thinking, begun=begun, parallel=parallel)
        assert read(pieces, thinking=thinking, begun=begun, parallel=parallel) == whole
        assert read(list(text), thinking=thinking, begun=begun, parallel=parallel) == whole


names = st.text("abc_-.", min_size=1)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.text("abc_-.", min_size=1), st.dictionaries(st.text(), values, max_size=4)), max_size=4
    ),
    space=st.sampled_from(["", "\n", " \n"]),
    before=st.text(max_size=20),
)
def test_calls_with_any_arguments_are_read_as_written(
    calls: list[tuple[str, dict[str, object]]], space: str, before: str
) -> None:
    text = before + "".join(call(name, arguments, space=space) + space for name, arguments in calls)
    _, content, found = read([text])
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    if calls:
        assert content == (before.rstrip() or "")
    else:
        assert content == text


@given(text=st.text("<a/b>", max_size=10))
def test_an_end_that_may_become_a_marker(text: str) -> None:
    held = partial_length(text, "</a>")
    lengths = [length for length in range(4) if text.endswith("</a>"[:length])]
    assert held == max(lengths)
