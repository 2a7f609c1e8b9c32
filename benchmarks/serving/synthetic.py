"""An engine that only keeps time, and the shard, group and replica around it, which are the real ones but for it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Any, cast

from ray import ObjectRef

from benchmarks.serving.counters import Counter
from deployments.group import ShardGroup
from deployments.identity import ModelIdentity
from deployments.replica import EngineReplica
from deployments.shard import EngineInfo, Meeting, Shard
from deployments.token_stream import Fanout
from engine.checkpoint.hub import resolve_model
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loop import EngineLoop
from engine.messages import EngineLoad, EngineRequest, FinishReason, StepOutput, TokenDelta
from engine.tokenizer import Tokenizer

STEP_SECONDS = "DIBIT_BENCHMARK_STEP_SECONDS"
"""Environment variable: how long a step takes."""

TEXT = " The quick brown fox jumps over the lazy dog, and nobody knows why it would; so it does the same once more."
"""What is generated, over and over."""

BLOCK_SIZE = 16
NUM_BLOCKS = 65_536


def step_seconds() -> float:
    """How long a step takes in this process."""
    return float(os.environ[STEP_SECONDS])


class SyntheticCore:
    """What :class:`EngineLoop` needs of an :class:`EngineCore`: each step takes its time, and gives every request one
    token of :data:`TEXT`. A prompt is one step, however many come at once."""

    def __init__(self, config: EngineConfig, token_ids: list[int], *, seconds: float) -> None:
        self._config = config
        self._token_ids = token_ids
        self._seconds = seconds
        self._requests: dict[str, tuple[EngineRequest, int, float]] = {}  # with tokens so far, and since when
        self._blocks = 0
        self._steps = 0
        self._busy_seconds = 0.0
        self._prefill_tokens = self._decode_tokens = self._context_tokens = 0
        self._last_seconds = seconds

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Never called: there is no work but what is added."""

    def has_work(self) -> bool:
        """Whether a request is under way."""
        return bool(self._requests)

    def add(self, request: EngineRequest, *, submitted: float | None = None) -> None:
        """Take a request in."""
        submitted = time.perf_counter() if submitted is None else submitted
        self._requests[request.request_id] = (request, 0, submitted)
        self._blocks += self._blocks_of(request)

    def abort(self, request_ids: Collection[str]) -> None:
        """Forget requests."""
        for request_id in request_ids:
            if (found := self._requests.pop(request_id, None)) is not None:
                self._blocks -= self._blocks_of(found[0])

    def step(self) -> StepOutput:
        """Sleep to the end of the step; then each request has one token more."""
        started = time.perf_counter()
        deltas = []
        finished = []
        for request_id, (request, count, submitted) in self._requests.items():
            done = count + 1 == request.max_tokens
            deltas.append(
                TokenDelta(
                    request_id,
                    [self._token_ids[count % len(self._token_ids)]],
                    finish_reason=FinishReason.LENGTH if done else None,
                    queued_seconds=started - submitted if count == 0 else 0.0,
                )
            )
            self._requests[request_id] = (request, count + 1, submitted)
            if count == 0:
                self._prefill_tokens += len(request.prompt_token_ids)
            self._context_tokens += len(request.prompt_token_ids) + count
            if done:
                finished.append(request_id)
        self._decode_tokens += len(deltas)
        self.abort(finished)
        time.sleep(max(0.0, started + self._seconds - time.perf_counter()))
        self._last_seconds = time.perf_counter() - started
        self._steps += 1
        self._busy_seconds += self._last_seconds
        return StepOutput(deltas, self.load())

    def load(self) -> EngineLoad:
        """How busy it is."""
        return EngineLoad(
            waiting_requests=0,
            running_requests=len(self._requests),
            waiting_prefill_tokens=0,
            free_blocks=NUM_BLOCKS - self._blocks,
            total_blocks=NUM_BLOCKS,
            steps=self._steps,
            step_seconds=self._last_seconds,
            busy_seconds=self._busy_seconds,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            context_tokens=self._context_tokens,
        )

    def check(self) -> None:
        """Check that no block is lost.

        Raises:
            RuntimeError: one is.
        """
        held = sum(self._blocks_of(request) for request, _, _ in self._requests.values())
        if held != self._blocks:
            raise RuntimeError(f"{self._blocks} blocks are taken, and the requests under way hold {held}")

    def shutdown(self) -> None:
        """There is nothing to let go of."""

    def _blocks_of(self, request: EngineRequest) -> int:
        return -(-(len(request.prompt_token_ids) + request.max_tokens) // BLOCK_SIZE)


class SyntheticShard(Shard):
    """A shard without a model, which counts the messages that it gets and sends."""

    async def load(self, meeting: Meeting | None, served_model_name: str) -> None:
        """Load no weights."""
        self._counter = Counter("ours")

    async def join(self, meeting: Meeting | None) -> EngineInfo | None:
        """Start the engine."""
        folder = await asyncio.to_thread(resolve_model, self._config.model, weights=False)
        tokenizer = Tokenizer.from_folder(folder)
        core = SyntheticCore(self._config, tokenizer.encode(TEXT), seconds=step_seconds())
        self._fanout = Fanout(self._loop, core.load())
        self._engine = EngineLoop(
            cast(EngineCore, core),  # the loop uses no more of it than there is
            on_step=self._fanout.publish,
            on_error=self._fail_from_thread,
        )
        self._engine.start()
        return EngineInfo(
            self._config.max_model_len or 2048, BLOCK_SIZE, NUM_BLOCKS, ModelIdentity.of_folder(folder).digest
        )

    async def submit(self, ingress_id: str, requests: list[EngineRequest]) -> None:
        """See :class:`Shard`."""
        self._counter.call()
        await super().submit(ingress_id, requests)

    async def abort(self, request_ids: list[str]) -> None:
        """See :class:`Shard`."""
        self._counter.call()
        await super().abort(request_ids)

    async def stream(self, ingress_id: str, tether: list[ObjectRef[None]]) -> AsyncGenerator[bytes, None]:
        """See :class:`Shard`."""
        async for item in super().stream(ingress_id, tether):
            self._counter.item()
            yield item


class SyntheticGroup(ShardGroup):
    """Starts synthetic shards."""

    shard = SyntheticShard


class SyntheticReplica(EngineReplica):
    """The Serve deployment of a synthetic engine; counts leases."""

    group = SyntheticGroup

    async def __init__(self, *args: Any, **options: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        self._counter = Counter("ours")
        await super().__init__(*args, **options)

    async def lease(self, name: str, *, replica_id: str) -> bool:
        """See :class:`EngineReplica`."""
        self._counter.call()
        return await super().lease(name, replica_id=replica_id)
