"""One ingress's connection to one engine: requests out, tokens in."""

from __future__ import annotations

import asyncio
import contextvars
import uuid
from collections.abc import Callable
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from deployments.actors import Actors
from deployments.directory import EngineAddress
from deployments.lease import open_lease
from deployments.mailbox import Inbox, Item
from deployments.token_stream import Demultiplexer
from engine.errors import EngineDeadError
from engine.messages import EngineLoad, EngineRequest

UNREAD_ITEMS = 8
"""Items the engine sends ahead of the reader; beyond that it merges steps."""

LEASE_AFTER_S = 0.1
"""Time after which a connection that has requests gets a lease, so that Serve lets the replica drain. One for all:
opening and ending a lease is work for three processes, more than all else that a request costs."""

REQUEST_LEASE_AFTER_S = 1.0
"""Age at which a request gets a lease of its own besides, for Serve's count of requests. Not while a burst's first
tokens are due, and not for a request that is over soon."""

SILENCE_S = 3.0
"""Silence after which the engine's process is asked whether it is there. An idle engine says something every second;
one that computes a long step doesn't, but its process answers."""

UNREACHABLE_S = 15.0
"""Time for that answer: a node that lost its power says nothing, and Ray itself takes longer to miss it."""

LOOK_TWICE_S = 0.5


class EngineConnection:
    """The stream from an engine, and the requests under way on it.

    Requests travel in one actor call at a time: those that come while one is under way go with the next, as Nagle's
    algorithm (RFC 896) has it, so a burst makes few calls and a single request doesn't wait. The leases, by which
    Serve sees requests, are opened when these have lasted a while; the replica ends them.
    """

    def __init__(
        self,
        address: EngineAddress,
        leases: DeploymentHandle[Any],
        *,
        actors: Actors,
        on_item: Callable[[EngineConnection, Item], None],
        suspect: bool = False,
    ) -> None:
        """Make the connection; :meth:`run` opens it.

        Args:
            address: where the engine is.
            leases: handle of ``EngineReplica.lease``.
            actors: where the engine's shard is found.
            on_item: called with all that is heard, before the requests get their tokens.
            suspect: the engine made no progress when it was last seen. It has to show some to be used: the first item
                of a stream says nothing about that, the second does.
        """
        self.address = address
        self._actors = actors
        self._on_item = on_item
        self.retired = False
        """Set when Serve has taken the replica out: it finishes what it has and gets nothing new."""
        self.stalled = False
        """Set when it was left because it made no progress."""
        self.came_up = False
        """For the owner to note that it has been ready."""
        self._lease_handle = leases
        # Of this connection alone: a call of the one before that comes late must not find the stream of this one.
        self._name = uuid.uuid4().hex
        self._shard: ActorHandle[Any] | None = None
        self._load: EngineLoad | None = None
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._items_needed = 2 if suspect else 1
        self._failure: EngineDeadError | None = None
        self._failed = asyncio.Event()
        self._requests = Demultiplexer(self._note)
        self._lease: asyncio.Task[None] | asyncio.TimerHandle | None = None  # or what will open it
        self._request_leases: dict[str, asyncio.TimerHandle] = {}  # those not opened yet, by request id
        self._to_submit: list[EngineRequest] = []
        self._to_abort: list[str] = []
        self._flushing = False
        self._submitting = False
        self._calls: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Requests under way here."""
        return len(self._requests)

    @property
    def load(self) -> EngineLoad | None:
        """The engine's load after the last step heard of; None before the first."""
        return self._load

    @property
    def ready(self) -> bool:
        """Whether new requests may be sent here."""
        return self._items_needed <= 0 and self._failure is None and not self.retired

    @property
    def silent_s(self) -> float:
        """Seconds since the engine was last heard."""
        return self._loop.time() - self._heard_at

    async def run(self) -> None:
        """Read the engine's stream until it ends; then every request under way gets an :class:`EngineDeadError`."""
        reading = asyncio.ensure_future(self._read())
        watching = asyncio.ensure_future(self._watch())
        failing = asyncio.ensure_future(self._failed.wait())
        ended = "was left"
        try:
            await asyncio.wait((reading, watching, failing), return_when=asyncio.FIRST_COMPLETED)
            if not failing.done():
                ended = watching.result() if watching.done() else reading.result()
        except asyncio.CancelledError:
            ended = "was left: the ingress shuts down"
            raise
        finally:
            self._fail(EngineDeadError(f"engine {self.address.replica_id} {ended}"))
            for task in (reading, watching, failing):
                task.cancel()

    def submit(self, request: EngineRequest) -> Inbox:
        """Send a request with others; its tokens come through the inbox.

        Raises:
            EngineDeadError: the engine is gone.
        """
        if self._failure is not None:
            raise self._failure
        inbox = self._requests.open(request.request_id)
        self._to_submit.append(request)
        self._schedule_flush()
        return inbox

    def finish(self, request_id: str, *, abort: bool) -> None:
        """End a request: forget it here, and with ``abort`` tell the engine to drop it."""
        self._requests.close(request_id)
        if (lease := self._request_leases.pop(request_id, None)) is not None:
            lease.cancel()
        if abort and self._failure is None:
            self._to_abort.append(request_id)
            self._schedule_flush()

    async def _read(self) -> str:
        """Pass the stream on; why it ended, in words."""
        try:
            shard = await self._actors.find(self.address.actor_name, self.address.namespace)
        except ValueError as error:  # no actor of that name
            return f"is gone: {error}"
        self._shard = shard
        # The tether is an object of ours that never comes to be. If this process dies, the engine hears of it by the
        # loss of the object's owner: Ray cancels neither a dead caller's stream nor anything else it left running.
        tether: Any = shard.tether.remote()
        stream = shard.stream.options(num_returns="streaming", _generator_backpressure_num_objects=UNREAD_ITEMS).remote(
            self._name, [tether]
        )
        try:
            async for item in stream:
                self._requests.deliver(await item)
        except RayError as error:
            return f"failed: {_first_line(error)}"
        finally:
            for call in (stream, tether):
                self._actors.cancel(call)
        return "closed its stream"

    async def _watch(self) -> str:
        """Wait until the engine has been silent for too long, or can't be reached; which of them, in words."""
        limit = self.address.stalled_after_s
        while True:
            await asyncio.sleep(max(0.0, min(limit - self.silent_s, SILENCE_S)))
            if self.silent_s >= limit and await self._still_silent(limit):
                self.stalled = True
                return f"has made no progress for {self.silent_s:.0f} s"
            if self.silent_s < SILENCE_S or self._shard is None:
                continue
            answer = asyncio.ensure_future(_answer(self._shard.is_there.remote()))
            done, _ = await asyncio.wait([answer], timeout=max(0.0, min(UNREACHABLE_S, limit - self.silent_s)))
            answer.cancel()
            if not done and self.silent_s >= UNREACHABLE_S and await self._still_silent(UNREACHABLE_S):
                return f"can't be reached; nothing was heard of it for {self.silent_s:.0f} s"

    async def _still_silent(self, limit: float) -> bool:
        """Look twice: if it was this event loop that stood still, what has come meanwhile is read first."""
        await asyncio.sleep(LOOK_TWICE_S)
        return self.silent_s >= limit

    def _note(self, item: Item) -> None:
        self._items_needed -= 1
        self._load = item.load
        self._heard_at = self._loop.time()
        self._on_item(self, item)

    def _schedule_flush(self) -> None:
        if not self._flushing and not self._submitting:
            self._flushing = True
            # In an empty context: these calls carry the requests of many HTTP clients, and Ray cancels every actor call
            # made in the context of a client that leaves (ray issue 52476).
            self._loop.call_soon(self._flush, context=contextvars.Context())

    def _flush(self) -> None:
        self._flushing = False
        submitted, self._to_submit = self._to_submit, []
        aborted, self._to_abort = self._to_abort, []
        if self._shard is None or self._failure is not None:
            return
        # What has ended before it was sent stays here: Ray may run two calls of an actor in any order, and if the abort
        # came first, the engine would work on the request for nobody.
        unsent = {request.request_id for request in submitted}.intersection(aborted)
        submitted = [request for request in submitted if request.request_id not in unsent]
        aborted = [request_id for request_id in aborted if request_id not in unsent]
        if submitted:
            self._submitting = True
            self._call(self._shard.submit.remote(self._name, submitted)).add_done_callback(self._submitted)
        if aborted:
            self._call(self._shard.abort.remote(aborted))
        self._plan_lease()
        for request in submitted:
            timer = self._loop.call_later(REQUEST_LEASE_AFTER_S, self._open_request_lease, request.request_id)
            self._request_leases[request.request_id] = timer

    def _plan_lease(self) -> None:
        if self._lease is None and self._failure is None and len(self._requests):
            self._lease = self._loop.call_later(LEASE_AFTER_S, self._open_lease)

    def _open_lease(self) -> None:
        self._lease = None
        if self._failure is None and len(self._requests):
            self._lease = self._hold(self._name)
            self._lease.add_done_callback(self._lease_ended)

    def _lease_ended(self, _: asyncio.Task[None]) -> None:
        # In a lull, perhaps of one step, and meanwhile there are requests again.
        self._lease = None
        self._plan_lease()

    def _open_request_lease(self, request_id: str) -> None:
        del self._request_leases[request_id]
        if self._failure is None:
            self._hold(request_id)

    def _hold(self, name: str) -> asyncio.Task[None]:
        lease = open_lease(self._lease_handle, name, replica_id=self.address.replica_id)
        return self._keep(lease)

    def _call(self, reply: Any) -> asyncio.Task[None]:
        return self._keep(self._loop.create_task(self._expect(reply)))

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return task

    def _submitted(self, _: asyncio.Task[None]) -> None:
        self._submitting = False
        if self._to_submit or self._to_abort:
            self._schedule_flush()

    async def _expect(self, reply: Any) -> None:
        try:
            await reply
        except RayError as error:
            self._fail(EngineDeadError(f"engine {self.address.replica_id} failed: {_first_line(error)}"))

    def _fail(self, failure: EngineDeadError) -> None:
        if self._failure is None:
            self._failure = failure
            self._failed.set()
            self._requests.fail(failure)


async def _answer(reply: Any) -> None:
    """Wait for the answer to a call; that it failed is an answer as well, of which the stream tells more."""
    try:
        await reply
    except RayError:
        return


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
