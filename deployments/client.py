"""EngineClient: how an ingress replica talks to the engines of its application."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.config import FailoverConfig
from deployments.connection import EngineConnection
from deployments.continuation import Continuation, Suspicion
from deployments.directory import EngineAddress, ModelInfo, ReplicaDirectory
from deployments.lease import hold_lease
from deployments.observer import Observer
from deployments.refusals import Refusals
from deployments.routing import Choice, Rates, Router, RoutingOptions
from deployments.token_stream import Inbox, Item
from deployments.waiting_room import WaitingRoom
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.messages import EngineLoad, EngineRequest, FinishReason, TokenDelta

__all__ = ["ClientOptions", "EngineClient", "EngineState", "ModelInfo", "PoolState"]

logger = logging.getLogger("ray.serve")

RECONNECT_S = 1.0
"""Pause before a replica that Serve still lists is tried again, and between calls for an engine."""

NEXT_POOL_AFTER_S = 30.0
"""Time that a pool which is scaled to zero has to start an engine, until the next such pool is asked as well."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """What is known of a pool before any engine of it is up."""

    name: str
    max_model_len: int
    on_demand: bool
    """Whether it may be scaled to zero, so that a request has to call for an engine."""


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What an ingress is told of its application by :func:`deployments.pool.client_options`."""

    info: ModelInfo
    identity: str | None
    """Of the model, see ``deployments.identity``; engines of another one are not used. None: any is."""
    pools: tuple[PoolState, ...]
    """In the order in which they are preferred when one has to be started."""
    routing: RoutingOptions
    failover: FailoverConfig


@dataclass(frozen=True, slots=True)
class EngineState:
    """What is known of an engine, for whoever shows or measures it."""

    address: EngineAddress
    load: EngineLoad | None
    rates: Rates | None
    """What the router has learned of its speed."""
    ready: bool
    """Whether it takes new requests."""
    retired: bool
    """Whether Serve has taken it out, and it only finishes what it has."""
    requests: int
    """Under way there for this ingress."""
    silent_s: float
    """Seconds since it was last heard."""


class EngineClient:
    """The engines of one application, seen from one ingress replica. Lives on one event loop."""

    def __init__(
        self,
        pools: Mapping[str, DeploymentHandle[Any]],
        options: ClientOptions,
        *,
        observer: Observer | None = None,
    ) -> None:
        """``pools`` are the handles of the pools' deployments, by the name of the pool."""
        self._handles = dict(pools)
        self._options = options
        self._observer = observer or Observer()
        self._ingress_id = uuid.uuid4().hex
        self._router = Router(options.routing, seed=random.getrandbits(32))
        self._room = WaitingRoom(options.failover)
        self._refusals = Refusals(lambda: [s.address for s in self.engines() if s.ready], self._tell_of_refused)
        self._max_model_lens = {pool.name: pool.max_model_len for pool in options.pools}
        self._connections: dict[str, EngineConnection] = {}  # by replica id
        self._routed: set[str] = set()  # replica ids that the router knows
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by replica id
        self._listed: dict[str, set[str]] = {name: set() for name in pools}  # replica ids by pool
        self._directories: list[ReplicaDirectory] = []
        self._subscriptions: list[asyncio.Task[None]] = []
        self._first_ready = asyncio.Event()
        self._closed = False

    async def start(self) -> None:
        """Find the engines and open their streams; once, on the ingress's loop.

        Returns when the first engine has answered, or at once if there need not be one until a request comes.
        """
        for name, handle in self._handles.items():
            directory = ReplicaDirectory(partial(self._on_change, name))
            self._directories.append(directory)
            self._subscriptions.append(asyncio.create_task(self._subscribe(handle, directory)))
        if not all(pool.on_demand for pool in self._options.pools):
            await self._first_ready.wait()

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return replace(self._options.info, max_model_len=max(self._max_model_lens.values()))

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
        run = Continuation(request)
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
                        if run.first_token_at is None and delta.token_ids:
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
        return any(c.ready for c in self._connections.values()) or any(p.on_demand for p in self._options.pools)

    def load(self) -> list[EngineLoad]:
        """The last known load of every engine that takes requests, in the order of their replica ids."""
        return [state.load for state in self.engines() if state.ready and state.load is not None]

    def engines(self) -> list[EngineState]:
        """All engines that this ingress is connected to, by pool and replica id."""
        found = sorted(self._connections.values(), key=lambda c: (c.address.pool, c.address.replica_id))
        return [
            EngineState(
                address=connection.address,
                load=connection.load,
                rates=self._router.rates(connection.address.replica_id)
                if connection.address.replica_id in self._routed
                else None,
                ready=connection.ready,
                retired=connection.retired,
                requests=len(connection),
                silent_s=connection.silent_s,
            )
            for connection in found
        ]

    async def close(self) -> None:
        """Abort what is under way and close the streams; called when the ingress replica shuts down."""
        self._closed = True
        self._refusals.close()
        self._directories.clear()
        tasks = [*self._subscriptions, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _place(self, run: Continuation, lost: EngineConnection | None) -> tuple[Choice, EngineConnection]:
        """Choose an engine for a request and reserve its place there, waiting for one to come up if there is none."""
        since = time.monotonic()
        waited = False
        calls: dict[str, asyncio.Task[None]] = {}  # by pool
        try:
            while True:
                choice = self._choose(run, lost, admitted=run.begun or waited)
                if choice is not None:
                    return choice, self._connections[choice.replica_id]
                for pool in self._pools_to_call(run, waited_s=time.monotonic() - since):
                    if pool not in calls:
                        calling = self._call_for_engine(pool, run.request.request_id)
                        calls[pool] = asyncio.create_task(calling, context=contextvars.Context())  # see open_lease
                with suppress(TimeoutError):
                    async with asyncio.timeout(NEXT_POOL_AFTER_S):
                        await self._room.wait(since=since, admitted=run.begun or waited)
                waited = True
        except OverloadedError:
            self._observer.refused("overloaded")
            self._refusals.add(len(run.request.prompt_token_ids))
            raise
        finally:
            for call in calls.values():
                call.cancel()

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
        unready = {replica_id for replica_id in self._routed if not self._connections[replica_id].ready}
        if len(unready) == len(self._routed):
            return None
        job = run.job(self._router.block_sizes, admitted=admitted)
        now = time.monotonic()
        if lost is not None:
            # An engine with the same weights on as many ranks goes on with the very same tokens; another one might
            # round otherwise.
            others = {i for i in self._routed if self._connections[i].address.pool != lost.address.pool}
            with suppress(EngineDeadError, RequestError, OverloadedError):
                return self._router.choose(job, now=now, exclude=unready | others)
        try:
            return self._router.choose(job, now=now, exclude=unready)
        except EngineDeadError:
            return None
        except RequestError:
            if self._absent_pools(run):
                return None
            raise

    def _absent_pools(self, run: Continuation) -> list[PoolState]:
        """Pools without an engine that could serve a request if they had one."""
        present = {self._connections[i].address.pool for i in self._routed if self._connections[i].ready}
        tokens = len(run.request.prompt_token_ids) + run.request.max_tokens
        return [
            pool
            for pool in self._options.pools
            if pool.name not in present and tokens <= self._max_model_lens[pool.name]
        ]

    def _pools_to_call(self, run: Continuation, *, waited_s: float) -> list[str]:
        """Pools that should start an engine for a request which has waited so long: one, and more as time goes by."""
        pools = [pool.name for pool in self._absent_pools(run) if pool.on_demand]
        return pools[: 1 + int(waited_s // NEXT_POOL_AFTER_S)]

    async def _call_for_engine(self, pool: str, request_id: str) -> None:
        """Let Serve know of a request that waits: a call to a pool without replicas is what makes it start one.

        The call ends when the pool has a replica. That one may be gone before it is of any use, and nothing would start
        another, so this lasts until the request has found a place and cancels it.
        """
        leases = self._handles[pool].options(method_name="lease")
        while True:
            if not self._listed[pool]:
                await hold_lease(leases, request_id, ingress_id=self._ingress_id, replica_id="")
            await asyncio.sleep(RECONNECT_S)

    async def _tell_of_refused(self, engine: EngineAddress, prompt_tokens: int) -> None:
        """Let a replica count what was turned away, for the autoscaling of its pool."""
        handle = self._handles[engine.pool].options(method_name="turned_away")
        with suppress(RayError, RayServeException):
            await handle.remote(prompt_tokens, replica_id=engine.replica_id)

    def _first_token(self, run: Continuation, choice: Choice, connection: EngineConnection, delta: TokenDelta) -> None:
        now = time.monotonic()
        if run.attempts == 1:
            self._router.first_token(choice, now=now)
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

    async def _subscribe(self, handle: DeploymentHandle[Any], directory: ReplicaDirectory) -> None:
        """Bring the directory to the handle's request router, see LeaseRouter; returns once a replica is there."""
        # Without a reservation it is no queued request to Serve, which would start an engine for it.
        async with handle.choose_replica(directory, _reserve=False):
            pass

    def _on_change(self, pool: str, engines: list[EngineAddress]) -> None:
        if self._closed:
            return
        wanted = [engine for engine in engines if self._options.identity in (None, engine.identity)]
        for engine in engines:
            if engine not in wanted:
                logger.warning("Engine %s serves another model and is not used.", engine.replica_id)
        self._listed[pool] = {engine.replica_id for engine in wanted}
        for connection in self._connections.values():
            if connection.address.pool == pool:
                connection.retired = connection.address.replica_id not in self._listed[pool]
        self._note_absence()
        for engine in wanted:
            if engine.replica_id not in self._tasks:
                task = asyncio.get_running_loop().create_task(self._stay_connected(engine))
                self._tasks[engine.replica_id] = task
                task.add_done_callback(partial(self._forget, engine.replica_id))

    async def _stay_connected(self, engine: EngineAddress) -> None:
        """Keep one engine's stream open while Serve lists it; afterwards it lasts until the replica has drained."""
        leases = self._handles[engine.pool].options(method_name="lease")
        suspect = False
        while engine.replica_id in self._listed[engine.pool]:
            connection = EngineConnection(
                engine, leases, ingress_id=self._ingress_id, on_item=self._heard, suspect=suspect
            )
            self._connections[engine.replica_id] = connection
            try:
                await connection.run()
            finally:
                self._routed.discard(engine.replica_id)
                self._router.remove(engine.replica_id)
                del self._connections[engine.replica_id]
                self._note_absence()
            suspect = connection.stalled
            if engine.replica_id in self._listed[engine.pool]:
                logger.warning("Lost engine %s.", engine.replica_id)
                await asyncio.sleep(RECONNECT_S)

    def _heard(self, connection: EngineConnection, item: Item) -> None:
        address = connection.address
        if address.replica_id not in self._routed:
            self._router.add(address.spec)
            self._routed.add(address.replica_id)
            self._max_model_lens[address.pool] = address.spec.max_model_len
        self._router.observe(
            address.replica_id, item.load, cached=item.cached, evicted=item.evicted, now=time.monotonic()
        )
        self._observer.loaded(address, item.load)
        if connection.ready and not connection.came_up:
            connection.came_up = True
            self._first_ready.set()
            self._room.engine_came(address.start_seconds)

    def _note_absence(self) -> None:
        if not any(connection.ready for connection in self._connections.values()):
            self._room.engines_gone()

    def _forget(self, replica_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[replica_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("The connection to engine %s failed.", replica_id, exc_info=error)
