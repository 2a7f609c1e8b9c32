"""How many pieces a conversation may have in all: while they are read, no stream of others goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.openai.errors import ApiError
from deployments.openai.requests.body import parse
from deployments.openai.requests.chat import ChatRequest
from deployments.openai.requests.messages import MAX_PIECES
from deployments.openai.requests.tokenization import TokenizeChat

PART = {"type": "text", "text": ""}
CALL = {"function": {"name": "f", "arguments": "{}"}}


def body(messages: list[Any]) -> bytes:
    return json.dumps({"messages": messages}).encode()


@pytest.mark.parametrize("model", [ChatRequest, TokenizeChat])
@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": [PART] * 128}, {"role": "assistant", "content": "", "tool_calls": [CALL] * 128}],
    ids=["parts", "calls"],
)
def test_too_many_pieces_are_refused(model: type[ChatRequest], message: dict[str, Any]) -> None:
    allowed = [message] * (MAX_PIECES // 128)
    assert len(parse(model, body(allowed)).messages) == len(allowed)
    with pytest.raises(
        ApiError, match=f"has {MAX_PIECES + 128} content parts and tool calls; at most {MAX_PIECES} are"
    ):
        parse(model, body([*allowed, message]))


def test_what_is_no_message_is_not_counted() -> None:
    with pytest.raises(ApiError):
        parse(ChatRequest, body([None, 3, {"role": "user", "content": {"a": 1}}]))
