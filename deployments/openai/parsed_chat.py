"""Chat answers whose text is read for thoughts and tool calls, in OpenAI's shapes (and DeepSeek's for the thoughts)."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from deployments.openai.chat import ChatFormat
from deployments.openai.generation import Choice, Collected
from deployments.openai.logprobs import chat_logprobs
from deployments.openai.parts import CallArguments, CallBegins, Content, Part, Thought
from deployments.openai.shape import MessageParser, Shape
from engine.messages import FinishReason
from engine.text.stream import TextDelta


class ParsedChatFormat(ChatFormat):
    """As :class:`ChatFormat`, for answers that are more than content.

    Args:
        shape: how to read them.
        include_reasoning: False drops the thoughts.
        options: those of :class:`ChatFormat`.
    """

    def __init__(self, *, shape: Shape, include_reasoning: bool, **options: Any) -> None:
        super().__init__(**options)
        self._shape = shape
        self._include_reasoning = include_reasoning
        self._parsers: dict[int, MessageParser] = {index: shape.parser() for index in range(options["num_choices"])}

    def opening(self) -> bytes:
        """A chunk for each choice that says who speaks."""
        content = b"null" if self._shape.calling.forced else b'""'
        fields = b'"delta":{"role":"assistant","content":%b}' % content
        return b"".join(self._chunks.raw(index, fields) for index in range(self._num_choices))

    def chunk(self, choice: Choice, delta: TextDelta) -> bytes:
        """The events of one delta; empty when there is nothing to say yet."""
        last = delta.finish_reason is not None
        parser = self._parsers[choice.index]
        deltas = self._deltas(parser.push(delta.text, last=last))
        if self._continuous:
            self._chunks.count(choice)
        logprobs = chat_logprobs(delta.logprobs) if self._logprobs and delta.logprobs else None
        if logprobs is not None and not deltas:
            deltas = [{}]
        data = b""
        for fields in deltas:
            data += self._chunks.any(choice.index, {"delta": fields}, logprobs=logprobs)
            logprobs = None  # of the whole delta, with its first chunk
        if last:
            reason = self._reason(parser, delta.finish_reason)
            data += self._chunks.any(choice.index, {"delta": {}}, finish_reason=reason, stop_reason=delta.stop_reason)
        return data

    def _message(self, result: Collected) -> dict[str, Any]:
        content: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        parser = self._shape.parser()
        for part in parser.push(result.text, last=True):
            match part:
                case Content(text):
                    content.append(text)
                case Thought(text):
                    thoughts.append(text)
                case CallBegins(_, name):
                    calls.append({**_new_call(), "function": {"name": name, "arguments": ""}})
                case CallArguments(index, text):
                    calls[index]["function"]["arguments"] += text
        message: dict[str, Any] = {"role": "assistant", "content": "".join(content), "refusal": None}
        if self._shape.thinking is not None and self._include_reasoning:
            message["reasoning_content"] = "".join(thoughts) or None
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        result.finish_reason = self._reason(parser, result.finish_reason)
        return message

    def _deltas(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case Content(text):
                    deltas.append({"content": text})
                case Thought(text) if self._include_reasoning:
                    deltas.append({"reasoning_content": text})
                case CallBegins(index, name):
                    call = {"index": index, **_new_call(), "function": {"name": name, "arguments": ""}}
                    deltas.append({"tool_calls": [call]})
                case CallArguments(index, text):
                    deltas.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
        return deltas

    def _reason(self, parser: MessageParser, reason: str | None) -> str | None:
        """OpenAI's: "tool_calls" where the model chose to call, "stop" where it had to call the one named."""
        if parser.num_calls and reason == FinishReason.STOP and self._shape.calling.mode != "named":
            return "tool_calls"
        return reason


def _new_call() -> dict[str, str]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
