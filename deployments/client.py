"""EngineClient: how an ingress replica talks to the engines of its application."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.connection import EngineConnection
from deployments.directory import EngineAddress, ModelInfo, ReplicaDirectory
from deployments.router import choose
from engine.errors import EngineDeadError
from engine.messages import EngineLoad, EngineRequest, TokenDelta

__all__ = ["EngineClient", "ModelInfo"]

logger = logging.getLogger("ray.serve")

RECONNECT_S = 1.0
"""Pause before a replica that Serve still lists is tried again."""


class EngineClient:
    """The engines of one application, seen from one ingress replica. Lives on one event loop."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """``handle`` is the EngineReplica handle that ``deployments.app.build`` binds into the Ingress."""
        self._handle = handle
        self._ingress_id = uuid.uuid4().hex
        self._info: ModelInfo | None = None
        self._connections: dict[str, EngineConnection] = {}  # by replica id
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by replica id
        self._listed: set[str] = set()
        self._directory: ReplicaDirectory | None = None
        self._first_ready = asyncio.Event()

    async def start(self) -> None:
        """Find the engines and open their streams; returns when the first has answered. Once, on the ingress's loop."""
        self._directory = ReplicaDirectory(self._on_change)
        async with self._handle.choose_replica(self._directory):
            pass  # a subscription, see LeaseRouter; the slot it holds meanwhile is given back
        await self._first_ready.wait()

    @property
    def info(self) -> ModelInfo:
        """What is served; available after :meth:`start`."""
        if self._info is None:
            raise RuntimeError("EngineClient.start() has not returned yet")
        return self._info

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one request on the engine chosen for it; ``async for delta in client.generate(request)``.

        The last delta has a ``finish_reason``. Closing the generator (``aclose()``, or cancelling the task that reads
        it) aborts the request on the engine at once. Tokens that come while the reader is busy are merged.

        Raises:
            RequestError: the engine can never serve the request.
            EngineDeadError: the engine died while the request was under way, or there is none.
        """
        connection = self._choose()
        inbox = connection.submit(request)
        under_way = True
        try:
            while under_way:
                delta = await inbox.get()
                under_way = delta.finish_reason is None
                yield delta
        finally:
            connection.finish(request.request_id, abort=under_way)

    def healthy(self) -> bool:
        """Whether some engine has shown progress or a heartbeat within the limit."""
        return any(connection.healthy for connection in self._connections.values())

    def load(self) -> list[EngineLoad]:
        """The last known load of every live engine, in the order of their replica ids."""
        ready = sorted((c for c in self._connections.values() if c.ready), key=lambda c: c.address.replica_id)
        return [connection.load for connection in ready if connection.load is not None]

    async def close(self) -> None:
        """Abort what is under way and close the streams; called when the ingress replica shuts down."""
        self._directory = None
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _choose(self) -> EngineConnection:
        candidates = [c.as_candidate(c.load) for c in self._connections.values() if c.ready and c.load is not None]
        if not candidates:
            raise EngineDeadError("no engine is running right now; one may be starting, so try again shortly")
        return self._connections[choose(candidates).replica_id]

    def _on_change(self, engines: list[EngineAddress]) -> None:
        if self._directory is None:
            return
        self._listed = {engine.replica_id for engine in engines}
        for replica_id, connection in self._connections.items():
            connection.retired = replica_id not in self._listed
        for engine in engines:
            if engine.replica_id not in self._tasks:
                task = asyncio.get_running_loop().create_task(self._stay_connected(engine))
                self._tasks[engine.replica_id] = task
                task.add_done_callback(partial(self._forget, engine.replica_id))

    async def _stay_connected(self, engine: EngineAddress) -> None:
        """Keep one engine's stream open while Serve lists it; afterwards it lasts until the replica has drained."""
        leases = self._handle.options(method_name="lease")
        while engine.replica_id in self._listed:
            connection = EngineConnection(
                engine, leases, ingress_id=self._ingress_id, on_open=partial(self._opened, engine.info)
            )
            self._connections[engine.replica_id] = connection
            try:
                await connection.run()
            finally:
                del self._connections[engine.replica_id]
            if engine.replica_id in self._listed:
                logger.warning("Lost engine %s.", engine.replica_id)
                await asyncio.sleep(RECONNECT_S)

    def _forget(self, replica_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[replica_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("The connection to engine %s failed.", replica_id, exc_info=error)

    def _opened(self, info: ModelInfo) -> None:
        self._info = info
        self._first_ready.set()
