"""One ingress's connection to one engine: requests out, tokens in."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from deployments.directory import EngineAddress
from deployments.router import Candidate, Unseen
from deployments.token_stream import Demultiplexer, Inbox
from engine.errors import EngineDeadError
from engine.messages import EngineLoad, EngineRequest

UNREAD_ITEMS = 8
"""Items the engine sends ahead of the reader; beyond that it merges steps."""

LEASE_AFTER_S = 0.1
"""Age at which a request gets its lease. Opening one is work for three processes, just when the first token is due; and
a request that is over sooner needs none."""

_Lease = asyncio.TimerHandle | DeploymentResponse[Any] | DeploymentResponseGenerator[Any]
"""A lease, or the timer that will open it; both can be cancelled."""


class EngineConnection:
    """The stream from an engine, and the requests under way on it.

    Requests and aborts of one turn of the event loop travel in one actor call each. The lease, by which Serve sees a
    request, is opened when the request has lasted a while, and cancelled when it ends.
    """

    def __init__(
        self, address: EngineAddress, leases: DeploymentHandle[Any], *, ingress_id: str, on_open: Callable[[], None]
    ) -> None:
        """Make the connection; :meth:`run` opens it.

        Args:
            address: where the engine is.
            leases: handle of ``EngineReplica.lease``.
            ingress_id: name of this ingress process, the same on all its connections.
            on_open: called once, when the engine has answered for the first time.
        """
        self.address = address
        self._on_open = on_open
        self.retired = False
        """Set when Serve has taken the replica out: it finishes what it has and gets nothing new."""
        self._lease_handle = leases
        self._ingress_id = ingress_id
        self._shard: ActorHandle[Any] | None = None
        self._load: EngineLoad | None = None
        self._unseen = Unseen()
        self._heard_at = 0.0
        self._failure: EngineDeadError | None = None
        self._requests = Demultiplexer(self._note_load)
        self._leases: dict[str, _Lease] = {}
        self._to_submit: list[EngineRequest] = []
        self._to_abort: list[str] = []
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def load(self) -> EngineLoad | None:
        """The engine's load after the last step heard of; None before the first."""
        return self._load

    @property
    def ready(self) -> bool:
        """Whether new requests may be sent here."""
        return self._load is not None and self._failure is None and not self.retired

    @property
    def healthy(self) -> bool:
        """Whether the engine takes requests and showed a sign of life within its limit."""
        return self.ready and time.monotonic() - self._heard_at < self.address.stalled_after_s

    def as_candidate(self, load: EngineLoad) -> Candidate:
        """This engine for the router."""
        return Candidate(self.address.replica_id, load, unseen=len(self._unseen), in_flight=len(self._requests))

    async def run(self) -> None:
        """Read the engine's stream until it ends; then every request under way gets an :class:`EngineDeadError`."""
        ended = "closed its stream"
        try:
            await self._read()
        except RayError as error:
            ended = f"failed: {_first_line(error)}"
        except ValueError as error:  # ray.get_actor: no actor of that name
            ended = f"is gone: {error}"
        except asyncio.CancelledError:
            ended = "was left: the ingress shuts down"
            raise
        finally:
            self._fail(EngineDeadError(f"engine {self.address.replica_id} {ended}"))

    def submit(self, request: EngineRequest) -> Inbox:
        """Send a request with the others of this turn; its tokens come through the inbox.

        Raises:
            EngineDeadError: the engine is gone.
        """
        if self._failure is not None:
            raise self._failure
        inbox = self._requests.open(request.request_id)
        self._unseen.add()
        self._to_submit.append(request)
        self._schedule_flush()
        return inbox

    def finish(self, request_id: str, *, abort: bool) -> None:
        """End a request: forget it here, end its lease, and with ``abort`` tell the engine to drop it."""
        self._requests.close(request_id)
        if (lease := self._leases.pop(request_id, None)) is not None:
            lease.cancel()
        if abort and self._failure is None:
            self._to_abort.append(request_id)
            self._schedule_flush()

    async def _read(self) -> None:
        # A blocking call to Ray's directory of actors, so not on the event loop.
        shard = await asyncio.to_thread(ray.get_actor, self.address.actor_name, self.address.namespace)
        self._shard = shard
        # The tether is an object of ours that never comes to be. If this process dies, the engine hears of it by the
        # loss of the object's owner: Ray cancels neither a dead caller's stream nor anything else it left running.
        tether: Any = shard.tether.remote()
        stream = shard.stream.options(num_returns="streaming", _generator_backpressure_num_objects=UNREAD_ITEMS).remote(
            self._ingress_id, [tether]
        )
        try:
            async for item in stream:
                self._requests.deliver(await item)
        finally:
            for call in (stream, tether):
                ray.cancel(call)

    def _note_load(self, load: EngineLoad) -> None:
        is_first = self._load is None
        self._load = load
        self._heard_at = time.monotonic()
        self._unseen.update(load)
        if is_first:
            self._on_open()

    def _schedule_flush(self) -> None:
        if len(self._to_submit) + len(self._to_abort) == 1:
            # In an empty context: these calls carry the requests of many HTTP clients, and Ray cancels every actor call
            # made in the context of a client that leaves (ray issue 52476).
            asyncio.get_running_loop().call_soon(self._flush, context=contextvars.Context())

    def _flush(self) -> None:
        submitted, self._to_submit = self._to_submit, []
        aborted, self._to_abort = self._to_abort, []
        if self._shard is None or self._failure is not None:
            return
        if submitted:
            self._call(self._shard.submit.remote(self._ingress_id, submitted))
        if aborted:
            self._call(self._shard.abort.remote(aborted))
        loop = asyncio.get_running_loop()
        for request_id in {request.request_id for request in submitted}.difference(aborted):
            self._leases[request_id] = loop.call_later(LEASE_AFTER_S, self._open_lease, request_id)

    def _open_lease(self, request_id: str) -> None:
        self._leases[request_id] = self._lease_handle.remote(
            request_id, ingress_id=self._ingress_id, replica_id=self.address.replica_id
        )

    def _call(self, reply: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._expect(reply))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _expect(self, reply: Any) -> None:
        try:
            await reply
        except RayError as error:
            self._fail(EngineDeadError(f"engine {self.address.replica_id} failed: {_first_line(error)}"))

    def _fail(self, failure: EngineDeadError) -> None:
        if self._failure is None:
            self._failure = failure
            self._requests.fail(failure)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
