"""``POST /v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from deployments.openai.answer import Job
from deployments.openai.generation import Choice, Collected, Engine
from deployments.openai.logprobs import chat_logprobs
from deployments.openai.models import check_model
from deployments.openai.prompts import Prompts, new_id
from deployments.openai.protocol import ChatRequest
from deployments.openai.sse import ChunkWriter
from engine.errors import RequestError
from engine.text import TextDelta


async def prepare_chat(body: bytes, engine: Engine, prompts: Prompts) -> Job:
    """Validate a request body down to tokens.

    Raises:
        ApiError, RequestError: the request can't be served as asked.
    """
    request = ChatRequest.parse(body)
    check_model(engine.info, request.model)
    params = request.sampling_params()
    answer_id = new_id("chatcmpl")
    messages = [message.for_template() for message in request.messages]
    token_ids = await prompts.tokenize_chat(messages, request.chat_template_kwargs or {})
    try:
        choices = prompts.choices([token_ids], params, engine.info.max_model_len, request_id=answer_id)
    except RequestError as error:
        field = "messages" if error.field == "prompt" else error.field
        raise RequestError(str(error), field=field, code=error.code) from None
    form = ChatFormat(
        answer_id=answer_id,
        model=engine.info.served_model_name,
        num_choices=len(choices),
        logprobs=params.logprobs is not None,
        include_usage=request.include_usage,
    )
    return Job(choices=choices, choices_per_prompt=params.n, format=form, stream=bool(request.stream))


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
    ) -> None:
        self._envelope: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": model}
        self._num_choices = num_choices
        self._logprobs = logprobs
        self._include_usage = include_usage
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
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": chat_logprobs(result.logprobs) if self._logprobs else None,
                "finish_reason": result.finish_reason,
                "stop_reason": result.stop_reason,
            }
            for index, result in enumerate(results)
        ]
        return {**self._envelope, "object": "chat.completion", "choices": choices, "usage": counts}
