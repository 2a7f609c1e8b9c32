"""From a validated job to an HTTP response, streamed or whole. Chat and completions differ only in their formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Send

from deployments.openai import sse
from deployments.openai.errors import from_exception
from deployments.openai.generation import Batch, Choice, Collected, Engine, collect, run, usage
from deployments.openai.http import send_json
from deployments.openai.pace import Pacer
from engine.errors import RequestError
from engine.text.stream import TextDelta


class Format(Protocol):
    """How one kind of answer looks on the wire."""

    def opening(self) -> bytes:
        """What a stream says before any token."""

    def chunk(self, choice: Choice, delta: TextDelta) -> bytes:
        """The event of one delta; empty when there is nothing to say yet."""

    def closing(self, counts: dict[str, object]) -> bytes:
        """What a stream says after the last token, without ``[DONE]``."""

    def whole(self, results: Sequence[Collected], counts: dict[str, object]) -> dict[str, Any]:
        """The answer in one piece."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was validated down to its tokens: from here on only the engine can fail."""

    choices: list[Choice]
    choices_per_prompt: int
    format: Format
    stream: bool
    structure_field: str = "structured_outputs"
    """The request field that asked for what became ``structured_outputs``."""


def in_clients_words(error: RequestError, structure_field: str) -> RequestError:
    """Blame the field that the client wrote."""
    if error.field is None or not error.field.startswith("structured_outputs"):
        return error
    return RequestError(str(error).replace(error.field, structure_field, 1), field=structure_field, code=error.code)


async def respond(engine: Engine, job: Job, send: Send, pacer: Pacer) -> None:
    """Generate and send the answer. Raises only before the response has begun."""
    try:
        await _respond(engine, job, send, pacer)
    except RequestError as error:
        raise in_clients_words(error, job.structure_field) from None


async def _respond(engine: Engine, job: Job, send: Send, pacer: Pacer) -> None:
    if job.stream:
        with pacer.stream():
            await _respond_streaming(engine, job, send, pacer)
    else:
        batches = run(engine, job.choices)
        try:
            results = await collect(batches, len(job.choices))
        finally:
            await batches.aclose()
        counts = usage(job.choices, job.choices_per_prompt)
        await send_json(send, sse.encode(job.format.whole(results, counts)))


async def _respond_streaming(engine: Engine, job: Job, send: Send, pacer: Pacer) -> None:
    form = job.format
    batches = run(engine, job.choices)
    try:
        # The status line waits for the first tokens: what fails before them gets a status of its own, not a broken 200.
        batch = await anext(batches)
        await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        data = form.opening() + _chunks(form, batch)
        running = len(job.choices) - _finished(batch)
        try:
            while running:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    await pacer.pause()
                batch = await anext(batches)
                running -= _finished(batch)
                data = _chunks(form, batch)
            data += form.closing(usage(job.choices, job.choices_per_prompt)) + sse.DONE
        except Exception as error:
            data = sse.event(from_exception(error).body())
        await send({"type": "http.response.body", "body": data})
    finally:
        await batches.aclose()


def _chunks(form: Format, batch: Batch) -> bytes:
    return b"".join([form.chunk(choice, delta) for choice, delta in batch])


def _finished(batch: Batch) -> int:
    """Choices that end with this batch."""
    return sum(delta.finish_reason is not None for _, delta in batch)
