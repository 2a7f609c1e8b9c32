"""Server-sent events, built for the per-token path: constant parts are encoded once, only the text each time."""

from __future__ import annotations

from typing import Any

import msgspec

from deployments.openai.generation import Choice, usage

encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold chunks back otherwise
]


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"


class ChunkWriter:
    """Writes the chunks of one streamed answer.

    Args:
        envelope: fields that every chunk repeats (``id``, ``object``, ``created``, ``model``).
        num_choices: choices of the answer.
        before_text: JSON of a choice between its index and its text, such as ``"delta":{"content":``.
        after_text: what closes that, such as ``}``.
        include_usage: chunks then have ``"usage": null``, as the last one alone has the counts.
    """

    def __init__(
        self,
        envelope: dict[str, Any],
        *,
        num_choices: int,
        before_text: bytes,
        after_text: bytes,
        include_usage: bool,
    ) -> None:
        self._envelope = envelope
        self._heads = [
            b"data: " + encode(envelope)[:-1] + b',"choices":[{"index":%d,' % index for index in range(num_choices)
        ]
        self._text_heads = [head + before_text for head in self._heads]
        end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._end = end
        self._text_end = after_text + b',"logprobs":null,"finish_reason":null' + end
        self._after_text = after_text

    def text(self, index: int, text: str) -> bytes:
        """A chunk of nothing but text: nearly all of them."""
        return self._text_heads[index] + encode(text) + self._text_end

    def rich(
        self,
        index: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> bytes:
        """A chunk with log probabilities, or the last one of a choice."""
        rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": finish_reason}
        if stop_reason is not None:
            rest["stop_reason"] = stop_reason
        return b"".join((self._text_heads[index], encode(text), self._after_text, b",", encode(rest)[1:-1], self._end))

    def any(
        self,
        index: int,
        fields: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> bytes:
        """A chunk whose choice has these ``fields`` in place of text."""
        choice = {**fields, "logprobs": logprobs, "finish_reason": finish_reason}
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return self._heads[index] + encode(choice)[1:-1] + self._end

    def count(self, choice: Choice) -> None:
        """The next chunk is of ``choice``, and says how many tokens that has so far."""
        self._end = b'}],"usage":' + encode(usage([choice], 1)) + b"}\n\n"
        self._text_end = self._after_text + b',"logprobs":null,"finish_reason":null' + self._end

    def raw(self, index: int, fields: bytes) -> bytes:
        """A chunk whose choice consists of ready JSON ``fields``."""
        return self._heads[index] + fields + b',"logprobs":null,"finish_reason":null' + self._end

    def usage(self, counts: dict[str, object]) -> bytes:
        """The chunk of token counts that ends a stream."""
        return event(encode({**self._envelope, "choices": [], "usage": counts}))
