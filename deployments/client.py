"""EngineClient: how an ingress replica talks to the engines of its application."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.cold_start import NEXT_POOL_AFTER_S, ColdStart
from deployments.config import FailoverConfig
from deployments.connection import EngineConnection
from deployments.continuation import Continuation, PromptHashes, Suspicion
from deployments.directory import EngineAddress, ModelInfo, PoolInfo
from deployments.engines import Engines, EngineState
from deployments.mailbox import Inbox
from deployments.observer import Observer
from deployments.refusals import Refusals
from deployments.routing import Choice, Router, RoutingOptions
from deployments.waiting_room import WaitingRoom
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.messages import EngineLoad, EngineRequest, FinishReason, TokenDelta

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What an ingress is told of its application by :func:`deployments.pool.client_options`."""

    info: ModelInfo
    identity: str | None
    """Of the model, see ``deployments.identity``; engines of another one are not used. None: any is."""
    pools: tuple[PoolInfo, ...]
    """In the order in which they are preferred when one has to be started."""
    routing: RoutingOptions
    failover: FailoverConfig


class EngineClient:
    """The engines of one application, seen from one ingress replica. Lives on one event loop."""

    def __init__(
        self,
        pools: Mapping[str, DeploymentHandle[Any]],
        options: ClientOptions,
        *,
        observer: Observer | None = None,
        engines: Callable[..., Engines] = Engines,
    ) -> None:
        """Make the client; :meth:`start` finds the engines.

        Args:
            pools: handles of the pools' deployments, by the name of the pool.
            options: what is served, and how.
            observer: hears of requests and loads.
            engines: makes what finds and keeps them.
        """
        self._handles = dict(pools)
        self._options = options
        self._observer = observer or Observer()
        self._router = Router(options.routing, seed=random.getrandbits(32))
        self._room = WaitingRoom(options.failover)
        self._prompts = PromptHashes()
        self._engines = engines(
            pools,
            options.pools,
            identity=options.identity,
            router=self._router,
            room=self._room,
            observer=self._observer,
        )
        self._refusals = Refusals(lambda: [s.address for s in self.engines() if s.ready], self._tell_of_refused)

    async def start(self) -> None:
        """Find the engines and open their streams; once, on the ingress's loop.

        Returns when the first engine has answered, or at once if there need not be one until a request comes.
        """
        self._engines.start()
        if not all(pool.on_demand for pool in self._options.pools):
            await self._engines.first_ready.wait()

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return replace(self._options.info, max_model_len=self._engines.max_model_len)

    @property
    def held(self) -> int:
        """Requests that wait for an engine to come up."""
        return len(self._room)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one request; ``async for delta in client.generate(request)``.

        If its engine is lost, it goes on on another one, with the tokens that would have come. While there is none, it
        waits. The last delta has a ``finish_reason``. Closing the generator (``aclose()``, or cancelling the task that
        reads it) aborts the request on the engine at once. Tokens that come while the reader is busy are merged.

        Raises:
            RequestError: no engine can ever serve the request.
            OverloadedError: there is too much to do; it was not begun.
            EngineDeadError: it lost too many engines, or none came up in time.
        """
        run = Continuation(request, self._prompts)
        connection: EngineConnection | None = None
        suspicion = Suspicion(self._options.failover)
        reason = "error"
        try:
            while True:
                choice, connection = await self._place(run, connection)
                inbox, attempt = self._submit(run, choice, connection)
                given = len(run.received)
                under_way = True
                try:
                    while under_way:
                        delta = await inbox.get()
                        if delta.token_ids and len(run.received) == given:
                            self._first_token(run, choice, connection, delta)
                        delta = run.accept(delta)
                        if delta.finish_reason is not None:
                            under_way, reason = False, str(delta.finish_reason)
                        yield delta
                    return
                except EngineDeadError as error:
                    failure = error
                finally:
                    connection.finish(attempt.request_id, abort=under_way)
                    self._router.finished(choice, tokens=len(run.received) - given, now=time.monotonic())
                logger.warning("Request %s lost its engine: %s", request.request_id, failure)
                if not connection.retired:  # one that drains has gone as it should
                    suspicion.engine_lost(failure, progressed=len(run.received) > given)
                self._observer.failed_over(connection.address)
        except (asyncio.CancelledError, GeneratorExit):
            reason = reason if reason != "error" else str(FinishReason.ABORT)
            raise
        finally:
            if connection is not None:
                self._finished(run, connection, reason)

    def healthy(self) -> bool:
        """Whether requests can be taken: an engine makes progress, or one starts when it is needed."""
        return any(connection.ready for connection in self._engines) or any(
            pool.on_demand for pool in self._options.pools
        )

    def load(self) -> list[EngineLoad]:
        """The last known load of every engine that takes requests, in the order of their replica ids."""
        return [state.load for state in self.engines() if state.ready and state.load is not None]

    def engines(self) -> list[EngineState]:
        """All engines that this ingress is connected to, by pool and replica id."""
        return self._engines.states()

    async def close(self) -> None:
        """Close the streams, which aborts what is under way; called when the ingress replica shuts down.

        Serve does so once the last request is over. Those that take longer than its patience end with the process.
        """
        self._refusals.close()
        await self._engines.close()

    async def _place(self, run: Continuation, lost: EngineConnection | None) -> tuple[Choice, EngineConnection]:
        """Choose an engine for a request and reserve its place there, waiting for one to come up if there is none."""
        since = time.monotonic()
        waited = False
        try:
            with ColdStart(self._engines, run.request) as start:
                while True:
                    choice = self._choose(run, lost, admitted=run.begun or waited)
                    if choice is not None:
                        return choice, self._engines.routed[choice.replica_id]
                    start.call(waited_s=time.monotonic() - since)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(NEXT_POOL_AFTER_S):
                            await self._room.wait(since=since, admitted=run.begun or waited)
                    waited = True
        except OverloadedError:
            self._observer.refused("overloaded")
            self._refusals.add(len(run.request.prompt_token_ids))
            raise

    def _submit(self, run: Continuation, choice: Choice, connection: EngineConnection) -> tuple[Inbox, EngineRequest]:
        """Send a request, or what is left of it, to the engine chosen."""
        self._observer.routed(
            run.request,
            connection.address,
            predicted_ttft_s=choice.predicted_ttft_s,
            cached_tokens=choice.cached_tokens,
        )
        attempt = run.next_attempt()
        return connection.submit(attempt), attempt

    def _choose(self, run: Continuation, lost: EngineConnection | None, *, admitted: bool) -> Choice | None:
        """The router's choice; None if no engine is up that could serve the request.

        Raises:
            RequestError: no engine of any pool could.
            OverloadedError: it has to be turned away.
        """
        routed = self._engines.routed
        unready = {replica_id for replica_id, connection in routed.items() if not connection.ready}
        if len(unready) == len(routed):
            return None
        job = run.job(self._router.block_sizes, admitted=admitted)
        now = time.monotonic()
        if lost is not None:
            # An engine with the same weights on as many ranks goes on with the very same tokens; another one might
            # round otherwise.
            others = {i for i, connection in routed.items() if connection.address.pool != lost.address.pool}
            with suppress(EngineDeadError, RequestError, OverloadedError):
                return self._router.choose(job, now=now, exclude=unready | others)
        try:
            return self._router.choose(job, now=now, exclude=unready)
        except EngineDeadError:
            return None
        except RequestError:
            if self._engines.absent_pools(run.request):
                return None
            raise

    async def _tell_of_refused(self, engine: EngineAddress, prompt_tokens: int) -> None:
        """Let a replica count what was turned away, for the autoscaling of its pool."""
        handle = self._handles[engine.pool].options(method_name="turned_away")
        with suppress(RayError, RayServeException):
            await handle.remote(prompt_tokens, replica_id=engine.replica_id)

    def _first_token(self, run: Continuation, choice: Choice, connection: EngineConnection, delta: TokenDelta) -> None:
        now = time.monotonic()
        self._router.first_token(choice, now=now)
        if run.first_token_at is not None:
            return  # it came from an engine that was lost
        self._observer.first_token(
            connection.address,
            ttft_s=now - run.started,
            predicted_ttft_s=choice.predicted_ttft_s,
            queued_s=delta.queued_seconds,
        )

    def _finished(self, run: Continuation, connection: EngineConnection, reason: str) -> None:
        now = time.monotonic()
        self._observer.finished(
            run.request,
            connection.address,
            reason=reason,
            e2e_s=now - run.started,
            ttft_s=(run.first_token_at or now) - run.started,
            tokens=len(run.received),
        )
