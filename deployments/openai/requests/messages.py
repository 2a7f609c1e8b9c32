"""The messages of a conversation, as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictStr, model_validator

from deployments.openai.fields import at_most

MAX_MESSAGES = 8192
"""Of a conversation. While they are read, no stream of others goes on."""

MAX_CONTENT_PARTS = 1024
"""Pieces of text in one message."""

MAX_CALLS_PER_MESSAGE = 128

MAX_PIECES = 16384
"""Content parts and tool calls of all messages together."""


def _text_part(part: Any) -> Any:
    """Say plainly that a picture is no text, instead of pydantic's complaint about a literal."""
    if isinstance(part, dict):
        kind = part.get("type")
        if kind == "refusal":  # what an assistant refused in an earlier turn
            return {"type": "text", "text": part.get("refusal")}
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"a content part is of type {kind!r:.80}; models here read parts of type 'text'")
    return part


class TextPart(BaseModel):
    """A piece of a message's content; models here read text only."""

    type: Literal["text"]
    text: StrictStr


class CalledFunction(BaseModel):
    """What a tool call of an earlier turn called."""

    name: StrictStr
    arguments: StrictStr


class PastCall(BaseModel):
    """A tool call of an earlier turn."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


Content = StrictStr | list[Annotated[TextPart, BeforeValidator(_text_part)]] | None


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Content, at_most(MAX_CONTENT_PARTS)] = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[PastCall] | None, at_most(MAX_CALLS_PER_MESSAGE)] = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None
    """vLLM's newer name of ``reasoning_content``."""
    audio: Any = None
    function_call: Any = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        if self.audio is not None:
            raise ValueError("audio is not supported; models here read text only")
        if self.function_call is not None:
            raise ValueError("function_call is deprecated and not supported; send tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to messages of role 'assistant', and this one is of {self.role!r}")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: in a role they know, without what it doesn't have."""
        found = self.model_dump(exclude_none=True, exclude={"reasoning"})
        if self.reasoning is not None:
            found.setdefault("reasoning_content", self.reasoning)
        found["role"] = "system" if self.role == "developer" else self.role
        found["content"] = found.get("content")
        return found


def _pieces_within_bounds(messages: Any) -> Any:
    """Count the pieces before they are looked at: each costs microseconds, in which no stream of others goes on."""
    if isinstance(messages, list):
        turns = [turn for turn in messages if isinstance(turn, dict)]
        lists = [found for turn in turns for found in (turn.get("content"), turn.get("tool_calls"))]
        pieces = sum(len(found) for found in lists if isinstance(found, list))
        if pieces > MAX_PIECES:
            raise ValueError(f"has {pieces} content parts and tool calls; at most {MAX_PIECES} are allowed")
    return messages


Messages = Annotated[
    list[Message],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_pieces_within_bounds),
    at_most(MAX_MESSAGES),
]
"""Of a conversation. Its length is looked at first, its pieces are counted next."""
