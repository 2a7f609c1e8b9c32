"""``POST /v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from deployments.openai.generation import Choice, Collected
from deployments.openai.logprobs import chat_logprobs, prompt_logprobs
from deployments.openai.sse import ChunkWriter
from engine.text.stream import TextDelta


class ChatFormat:
    """The wire format of chat answers; see :class:`deployments.openai.answer.Format`."""

    def __init__(
        self,
        *,
        answer_id: str,
        model: str,
        num_choices: int,
        logprobs: bool,
        include_usage: bool,
        continuous_usage: bool = False,
    ) -> None:
        self._envelope: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": model}
        self._num_choices = num_choices
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._continuous = continuous_usage
        self._chunks = ChunkWriter(
            {**self._envelope, "object": "chat.completion.chunk"},
            num_choices=num_choices,
            before_text=b'"delta":{"content":',
            after_text=b"}",
            include_usage=include_usage,
        )

    def opening(self) -> bytes:
        """A chunk for each choice that says who speaks."""
        fields = b'"delta":{"role":"assistant","content":""}'
        return b"".join(self._chunks.raw(index, fields) for index in range(self._num_choices))

    def chunk(self, choice: Choice, delta: TextDelta) -> bytes:
        """The event of one delta; empty when there is nothing to say yet."""
        if self._continuous:
            self._chunks.count(choice)
        if delta.finish_reason is None and not delta.logprobs:
            return self._chunks.text(choice.index, delta.text) if delta.text else b""
        return self._chunks.rich(
            choice.index,
            delta.text,
            logprobs=chat_logprobs(delta.logprobs or ()) if self._logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    def closing(self, counts: dict[str, object]) -> bytes:
        """The counts, where the client asked for them."""
        return self._chunks.usage(counts) if self._include_usage else b""

    def whole(self, results: Sequence[Collected], counts: dict[str, object]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                "index": index,
                "message": self._message(result),
                "logprobs": chat_logprobs(result.logprobs) if self._logprobs else None,
                "finish_reason": result.finish_reason,
                "stop_reason": result.stop_reason,
            }
            for index, result in enumerate(results)
        ]
        answer = {**self._envelope, "object": "chat.completion", "choices": choices, "usage": counts}
        if results[0].prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(results[0].prompt_logprobs)
        return answer

    def _message(self, result: Collected) -> dict[str, Any]:
        return {"role": "assistant", "content": result.text, "refusal": None}
