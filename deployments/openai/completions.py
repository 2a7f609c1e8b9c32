"""``POST /v1/completions``: prompts in (texts or token ids), their continuations out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

from deployments.openai.answer import Job, in_clients_words
from deployments.openai.generation import Choice, Collected, Engine
from deployments.openai.logprobs import completion_logprobs, num_characters, prompt_logprobs, with_prompt
from deployments.openai.models import check_model
from deployments.openai.prompts import Prompts, new_id
from deployments.openai.requests.body import parse
from deployments.openai.requests.completion import CompletionRequest
from deployments.openai.sse import ChunkWriter
from engine.errors import RequestError
from engine.outputs import Logprob, PositionLogprobs
from engine.text.stream import TextDelta
from engine.tokenizer import Tokenizer


async def prepare_completion(body: bytes, engine: Engine, prompts: Prompts) -> Job:
    """Validate a request body down to the tokens of every prompt.

    Raises:
        ApiError, RequestError: the request can't be served as asked.
    """
    request = parse(CompletionRequest, body)
    prompts.observer.ignored_fields(request.unknown_fields)
    check_model(engine.info, request.model)
    answer_id = new_id("cmpl")
    structure = request.structure
    options = None if structure is None else await asyncio.to_thread(lambda: structure.options)
    field = "structured_outputs" if structure is None else structure.field
    try:
        params = request.sampling_params(prompts.sampling_defaults, options)
    except RequestError as error:
        raise in_clients_words(error, field) from None
    token_ids = await prompts.tokenize(request.prompts, params.n)
    choices = prompts.choices(
        token_ids, params, engine.info.max_model_len, request_id=answer_id, priority=request.priority or 0
    )
    echoed: list[str] = []
    if request.echo:
        texts = [text if isinstance(text, str) else prompts.tokenizer.decode(text) for text in request.prompts]
        echoed = [text for text in texts for _ in range(params.n)]
    form = CompletionFormat(
        answer_id=answer_id,
        model=engine.info.served_model_name,
        choices=choices,
        echoed=echoed,
        echo_only=request.echo_only,
        logprobs=request.logprobs is not None,
        best=(request.n or 1, params.n),
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
    )
    return Job(
        choices=choices,
        choices_per_prompt=params.n,
        format=form,
        stream=bool(request.stream),
        structure_field=field,
    )


class CompletionFormat:
    """The wire format of completions; see :class:`deployments.openai.answer.Format`.

    Args:
        echoed: text before each choice's own, or empty without echo.
        echo_only: nothing but that text is wanted.
        best: (wanted, generated) choices of each prompt; the likeliest are taken.
    """

    def __init__(
        self,
        *,
        answer_id: str,
        model: str,
        choices: Sequence[Choice],
        echoed: Sequence[str],
        echo_only: bool,
        logprobs: bool,
        best: tuple[int, int],
        include_usage: bool,
        continuous_usage: bool,
    ) -> None:
        self._envelope: dict[str, Any] = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._choices = choices
        self._echoed = echoed
        self._echo_only = echo_only
        self._echo_logprobs = bool(echoed) and logprobs
        self._logprobs = logprobs
        self._best = best
        self._include_usage = include_usage
        self._continuous = continuous_usage
        self._offsets = [0] * len(choices)
        self._begun = [False] * len(choices)
        self._chunks = ChunkWriter(
            self._envelope,
            num_choices=len(choices),
            before_text=b'"text":',
            after_text=b"",
            include_usage=include_usage,
        )

    def opening(self) -> bytes:
        """The prompts, where the client wants them echoed; their log probabilities come with the first token."""
        if self._echo_logprobs:
            return b""
        return b"".join(self._chunks.text(index, text) for index, text in enumerate(self._echoed))

    def chunk(self, choice: Choice, delta: TextDelta) -> bytes:
        """The event of one delta; empty when there is nothing to say yet."""
        if self._continuous:
            self._chunks.count(choice)
        if delta.finish_reason is None and not delta.logprobs and not self._echo_logprobs:
            return self._chunks.text(choice.index, delta.text) if delta.text else b""
        text = "" if self._echo_only else delta.text
        logprobs = None
        if self._logprobs:
            positions = () if self._echo_only else delta.logprobs or ()
            index = choice.index
            logprobs = completion_logprobs(positions, text_offset=self._offsets[index])
            self._offsets[index] += sum(num_characters(position) for position in positions)
            if self._echo_logprobs and not self._begun[index]:
                self._begun[index] = True
                logprobs = self._with_prompt(choice, positions)
                text = self._echoed[index] + text
                self._offsets[index] += len(self._echoed[index])
        return self._chunks.rich(
            choice.index,
            text,
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    def closing(self, counts: dict[str, object]) -> bytes:
        """The counts, where the client asked for them."""
        return self._chunks.usage(self._counts(counts)) if self._include_usage else b""

    def whole(self, results: Sequence[Collected], counts: dict[str, object]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {"index": number, **self._choice(index, results[index])}
            for number, index in enumerate(self._taken(results))
        ]
        return {**self._envelope, "choices": choices, "usage": self._counts(counts)}

    def _choice(self, index: int, result: Collected) -> dict[str, Any]:
        echoed = self._echoed[index] if self._echoed else ""
        logprobs = None
        if self._logprobs:
            positions = [] if self._echo_only else result.logprobs
            logprobs = (
                self._with_prompt(self._choices[index], positions)
                if echoed
                else completion_logprobs(positions, text_offset=0)
            )
        choice: dict[str, Any] = {
            "text": echoed if self._echo_only else echoed + result.text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._echo_only else result.finish_reason,
            "stop_reason": None if self._echo_only else result.stop_reason,
        }
        if result.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs)
        return choice

    def _taken(self, results: Sequence[Collected]) -> list[int]:
        """Which results are the answer's choices: of every prompt the likeliest, best first."""
        wanted, generated = self._best
        if wanted == generated:
            return list(range(len(results)))

        def likelihood(index: int) -> float:
            return sum(position.logprob for position in results[index].logprobs)

        return [
            index
            for first in range(0, len(results), generated)
            for index in sorted(range(first, first + generated), key=likelihood, reverse=True)[:wanted]
        ]

    def _with_prompt(self, choice: Choice, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        first = first_token(choice.request.prompt_token_ids[0], choice.tokenizer)
        echoed = self._echoed[choice.index]
        completion = completion_logprobs(positions, text_offset=len(echoed))
        # A space that tokenizing put before the text is no part of what is echoed.
        offset = num_characters(first) - (first.token.startswith(" ") and not echoed.startswith(" "))
        return with_prompt(first, choice.prompt_logprobs or (), completion, text_offset=offset)

    def _counts(self, counts: dict[str, object]) -> dict[str, object]:
        if not self._echo_only:
            return counts
        return {**counts, "completion_tokens": 0, "total_tokens": counts["prompt_tokens"]}


def first_token(token_id: int, tokenizer: Tokenizer) -> Logprob:
    """A prompt's first token, whose probability nobody knows."""
    return Logprob(token_id, *tokenizer.token_text(token_id), logprob=math.nan, rank=0)
