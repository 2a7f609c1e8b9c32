"""``POST /v1/completions``: prompts in (texts or token ids), their continuations out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from deployments.openai.answer import Job
from deployments.openai.generation import Choice, Collected, Engine
from deployments.openai.logprobs import completion_logprobs, num_characters
from deployments.openai.models import check_model
from deployments.openai.prompts import Prompts, new_id
from deployments.openai.protocol import CompletionRequest
from deployments.openai.sse import ChunkWriter
from engine.text import TextDelta


async def prepare_completion(body: bytes, engine: Engine, prompts: Prompts) -> Job:
    """Validate a request body down to the tokens of every prompt.

    Raises:
        ApiError, RequestError: the request can't be served as asked.
    """
    request = CompletionRequest.parse(body)
    check_model(engine.info, request.model)
    params = request.sampling_params()
    answer_id = new_id("cmpl")
    token_ids = await prompts.tokenize(request.prompts, params.n)
    choices = prompts.choices(token_ids, params, engine.info.max_model_len, request_id=answer_id)
    echoed: list[str] = []
    if request.echo:
        texts = [text if isinstance(text, str) else prompts.tokenizer.decode(text) for text in request.prompts]
        echoed = [text for text in texts for _ in range(params.n)]
    form = CompletionFormat(
        answer_id=answer_id,
        model=engine.info.served_model_name,
        num_choices=len(choices),
        echoed=echoed,
        logprobs=params.logprobs is not None,
        include_usage=request.include_usage,
    )
    return Job(choices=choices, choices_per_prompt=params.n, format=form, stream=bool(request.stream))


class CompletionFormat:
    """The wire format of completions; see :class:`deployments.openai.answer.Format`.

    Args:
        echoed: text before each choice's own, or empty without echo.
    """

    def __init__(
        self,
        *,
        answer_id: str,
        model: str,
        num_choices: int,
        echoed: Sequence[str],
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._envelope: dict[str, Any] = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._echoed = echoed
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._offsets = [0] * num_choices
        self._chunks = ChunkWriter(
            self._envelope,
            num_choices=num_choices,
            before_text=b'"text":',
            after_text=b"",
            include_usage=include_usage,
        )

    def opening(self) -> bytes:
        """The prompts, where the client wants them echoed."""
        return b"".join(self._chunks.text(index, text) for index, text in enumerate(self._echoed))

    def chunk(self, choice: Choice, delta: TextDelta) -> bytes:
        """The event of one delta; empty when there is nothing to say yet."""
        if delta.finish_reason is None and not delta.logprobs:
            return self._chunks.text(choice.index, delta.text) if delta.text else b""
        logprobs = None
        if self._logprobs:
            positions = delta.logprobs or ()
            offset = self._offsets[choice.index]
            logprobs = completion_logprobs(positions, text_offset=offset)
            added = sum(num_characters(position) for position in positions)
            self._offsets[choice.index] = offset + added
        return self._chunks.rich(
            choice.index,
            delta.text,
            logprobs=logprobs,
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
                "text": (self._echoed[index] if self._echoed else "") + result.text,
                "logprobs": completion_logprobs(result.logprobs, text_offset=0) if self._logprobs else None,
                "finish_reason": result.finish_reason,
                "stop_reason": result.stop_reason,
            }
            for index, result in enumerate(results)
        ]
        return {**self._envelope, "choices": choices, "usage": counts}
