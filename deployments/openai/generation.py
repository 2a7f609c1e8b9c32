"""The choices of one HTTP request, running on an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import EngineDeadError
from engine.messages import EngineRequest, FinishReason, TokenDelta
from engine.outputs import PositionLogprobs
from engine.text.stream import TextDelta, TextStream
from engine.tokenizer import Tokenizer


class ServedModel(Protocol):
    """What the endpoints must know of the model behind an engine."""

    @property
    def served_model_name(self) -> str:
        """The name clients ask for."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and answer together."""

    @property
    def created(self) -> int:
        """When serving began, Unix seconds."""


class Engine(Protocol):
    """What the endpoints need of an engine; ``deployments.client.EngineClient`` is one."""

    @property
    def info(self) -> ServedModel:
        """What is served."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        """Run a request; the last delta has a finish reason, closing the generator aborts."""

    def healthy(self) -> bool:
        """Whether the engine makes progress."""


@dataclass(slots=True)
class Choice:
    """One sequence of an answer, and what it has produced."""

    index: int
    request: EngineRequest
    text_stream: TextStream
    tokenizer: Tokenizer
    num_cached_tokens: int = 0
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """One for each prompt token, where asked for, once the first new token is there."""

    def push(self, delta: TokenDelta) -> TextDelta:
        """Take in new tokens; returns what may be shown of them.

        Raises:
            EngineDeadError: the engine gave the request up.
        """
        if delta.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise EngineDeadError("The engine ended this request before it was complete; send it again.")
        if delta.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = [
                None if entry is None else PositionLogprobs.of(entry, self.tokenizer) for entry in delta.prompt_logprobs
            ]
        return self.text_stream.push(delta)


@dataclass(slots=True)
class Collected:
    """A finished choice, whole."""

    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None


Batch = list[tuple[Choice, TextDelta]]


async def run(engine: Engine, choices: Sequence[Choice]) -> AsyncGenerator[Batch]:
    """Run all choices at once; yields what is new, as much as there is, until each has finished.

    Closing the generator aborts what still runs. Stop strings end a choice here, and with it its engine request.

    Raises:
        RequestError: an engine refused.
        EngineDeadError: an engine died.
    """
    if len(choices) == 1:
        deltas = _follow(engine, choices[0])
        try:
            async for text in deltas:
                yield [(choices[0], text)]
        finally:
            await deltas.aclose()
        return
    merged: asyncio.Queue[tuple[Choice, TextDelta] | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(engine, choice, merged)) for choice in choices]
    running = len(tasks)
    try:
        while running:
            item = await merged.get()
            batch: Batch = []
            while True:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    batch.append(item)
                if merged.empty():
                    break
                item = merged.get_nowait()
            if batch:
                yield batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(engine: Engine, choice: Choice) -> AsyncGenerator[TextDelta]:
    deltas = engine.generate(choice.request)
    try:
        async for delta in deltas:
            text = choice.push(delta)
            yield text
            if text.finish_reason is not None:
                return
    finally:
        await deltas.aclose()
    raise EngineDeadError("The engine's stream ended before the request was complete; send it again.")


async def _pump(
    engine: Engine, choice: Choice, merged: asyncio.Queue[tuple[Choice, TextDelta] | Exception | None]
) -> None:
    deltas = _follow(engine, choice)
    try:
        async for text in deltas:
            merged.put_nowait((choice, text))
        merged.put_nowait(None)
    except Exception as error:
        merged.put_nowait(error)
    finally:
        await deltas.aclose()


async def collect(batches: AsyncIterator[Batch], num_choices: int) -> list[Collected]:
    """Read a generation to its end."""
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    collected = [Collected() for _ in range(num_choices)]
    async for batch in batches:
        for choice, delta in batch:
            result = collected[choice.index]
            texts[choice.index].append(delta.text)
            if delta.logprobs:
                result.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                result.finish_reason = delta.finish_reason
                result.stop_reason = delta.stop_reason
                result.prompt_logprobs = choice.prompt_logprobs
    for result, pieces in zip(collected, texts, strict=True):
        result.text = "".join(pieces)
    return collected


def usage(choices: Sequence[Choice], choices_per_prompt: int) -> dict[str, object]:
    """OpenAI's token counts: a prompt counts once, however many choices it has."""
    firsts = choices[::choices_per_prompt]
    prompt_tokens = sum(len(choice.request.prompt_token_ids) for choice in firsts)
    completion_tokens = sum(choice.text_stream.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in firsts)},
    }
