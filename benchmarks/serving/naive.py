"""What ours is compared with: an item of a Serve stream for each token of each request, and no engine at all."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.serving.counters import Counter
from benchmarks.serving.synthetic import TEXT, step_seconds
from deployments.app import IN_ONE_LOOP
from deployments.openai import sse
from engine.tokenizer import Tokenizer

UNBOUNDED = 100_000

Source = Callable[[int], AsyncGenerator[str, None]]
"""Texts of as many tokens as asked for."""


class Metronome:
    """Steps on an event loop: each takes its time, and gives every request one token."""

    def __init__(self, model: str) -> None:
        """Read the vocabulary of ``model``, a folder."""
        tokenizer = Tokenizer.from_folder(model)
        self._pieces = [tokenizer.token_bytes(token_id).decode() for token_id in tokenizer.encode(TEXT)]
        self._seconds = step_seconds()
        self._requests: dict[asyncio.Queue[str], int] = {}  # tokens so far
        self._beating: asyncio.Task[None] | None = None

    async def generate(self, count: int) -> AsyncGenerator[str, None]:
        """The texts of ``count`` tokens, each when it is due."""
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._requests[queue] = 0
        if self._beating is None:
            self._beating = asyncio.get_running_loop().create_task(self._beat())
        try:
            for _ in range(count):
                yield await queue.get()
        finally:
            del self._requests[queue]

    async def _beat(self) -> None:
        while self._requests:
            started = time.perf_counter()
            await asyncio.sleep(self._seconds)
            while (rest := started + self._seconds - time.perf_counter()) > 0:
                await asyncio.sleep(rest)
            for queue, count in self._requests.items():
                queue.put_nowait(self._pieces[count % len(self._pieces)])
                self._requests[queue] = count + 1
        self._beating = None


class CompletionApp:
    """``POST /v1/completions``, streamed, and nothing else: no validation, no detokenizing, a chunk for each token."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        if scope["method"] != "POST":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
            return
        await self._complete(msgspec.json.decode(body), send)

    async def _complete(self, request: dict[str, Any], send: Send) -> None:
        envelope = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        chunks = sse.ChunkWriter(
            {**envelope, "model": request["model"]},
            num_choices=1,
            before_text=b'"text":',
            after_text=b"",
            include_usage=True,
        )
        begun = False
        count = 0
        async for text in self._source(request["max_tokens"]):
            if not begun:
                await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
                begun = True
            count += 1
            await send({"type": "http.response.body", "body": chunks.text(0, text), "more_body": True})
        await send({"type": "http.response.body", "body": chunks.usage({"completion_tokens": count}) + sse.DONE})


@serve.deployment(
    name="Floor",
    max_ongoing_requests=UNBOUNDED,
    ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": IN_ONE_LOOP}},  # as ours
    logging_config={"enable_access_log": False},
)
@serve.ingress()
class Floor:
    """An ingress that generates by itself."""

    def __init__(self, model: str) -> None:
        self._metronome = Metronome(model)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve once."""
        return CompletionApp(self._metronome.generate)


@serve.deployment(
    name="NaiveEngine",
    max_ongoing_requests=UNBOUNDED,
    ray_actor_options={"num_cpus": 0},
    logging_config={"enable_access_log": False},
)
class NaiveEngine:
    """Streams each request's tokens through Serve."""

    def __init__(self, model: str) -> None:
        self._metronome = Metronome(model)
        self._counter = Counter("naive")

    async def generate(self, count: int) -> AsyncGenerator[str, None]:
        """The texts of ``count`` tokens, an item each."""
        self._counter.call()
        async for text in self._metronome.generate(count):
            self._counter.item()
            yield text


@serve.deployment(
    name="NaiveIngress",
    max_ongoing_requests=UNBOUNDED,
    ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": IN_ONE_LOOP}},  # as ours
    logging_config={"enable_access_log": False},
)
@serve.ingress()
class NaiveIngress:
    """Passes on what a :class:`NaiveEngine` streams."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = engine.options(stream=True, method_name="generate")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve once."""
        return CompletionApp(self._generate)

    async def _generate(self, count: int) -> AsyncGenerator[str, None]:
        async for text in self._engine.remote(count):
            yield text
