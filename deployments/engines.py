"""The engines of an application, as one ingress finds them through Serve and keeps connected to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.actors import Actors
from deployments.connection import EngineConnection
from deployments.directory import EngineAddress, PoolInfo, ReplicaDirectory
from deployments.mailbox import Item
from deployments.observer import Observer
from deployments.routing import Rates, Router
from deployments.waiting_room import WaitingRoom
from engine.messages import EngineLoad, EngineRequest

logger = logging.getLogger("ray.serve")

RECONNECT_S = 1.0
"""Pause before a replica that Serve still lists is tried again."""


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


class Engines:
    """A connection to each engine that Serve lists, and to those it has listed until they have drained.

    The router is told of an engine when it is first heard, the waiting room when it takes requests. Lives on one event
    loop.
    """

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle[Any]],
        pools: Sequence[PoolInfo],
        *,
        identity: str | None,
        router: Router,
        room: WaitingRoom,
        observer: Observer,
        actors: Actors | None = None,
    ) -> None:
        """Know of no engine; :meth:`start` finds them.

        Args:
            handles: of the pools' deployments, by the name of the pool.
            pools: in the order in which they are preferred when one has to be started.
            identity: of the model, see ``deployments.identity``; engines of another one are not used. None: any is.
            router: gets to know the engines, and their loads.
            room: hears when one comes up, and when the last has gone.
            observer: hears of the loads.
            actors: where the engines' shards are found; None: through Ray.
        """
        self.first_ready = asyncio.Event()
        """Set when an engine has been ready."""
        self._handles = dict(handles)
        self._pools = tuple(pools)
        self._identity = identity
        self._router = router
        self._room = room
        self._observer = observer
        self._actors = actors or Actors()
        self._max_model_lens = {pool.name: pool.max_model_len for pool in pools}
        self._connections: dict[str, EngineConnection] = {}  # by replica id
        self._routed: dict[str, EngineConnection] = {}  # those that the router knows, by replica id
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by replica id
        self._listed: dict[str, set[str]] = {name: set() for name in handles}  # replica ids by pool
        self._directories: list[ReplicaDirectory] = []
        self._subscriptions: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self) -> None:
        """Begin to look for engines; once, on the ingress's loop."""
        for name, handle in self._handles.items():
            directory = ReplicaDirectory(partial(self.update, name))
            self._directories.append(directory)
            self._subscriptions.append(asyncio.create_task(_subscribe(handle, directory)))

    async def close(self) -> None:
        """Close all connections, which aborts what is under way on them."""
        self._closed = True
        self._directories.clear()
        tasks = [*self._subscriptions, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._actors.close()

    def __iter__(self) -> Iterator[EngineConnection]:
        """All connections, those not heard yet and those that drain among them."""
        return iter(self._connections.values())

    @property
    def routed(self) -> Mapping[str, EngineConnection]:
        """The connections that the router may choose from, by replica id; not all of them need be ready."""
        return self._routed

    @property
    def max_model_len(self) -> int:
        """Longest sequence, in tokens, that some pool takes."""
        return max(self._max_model_lens.values())

    def states(self) -> list[EngineState]:
        """All engines that are connected, by pool and replica id."""
        found = sorted(self, key=lambda c: (c.address.pool, c.address.replica_id))
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

    def leases(self, pool: str) -> DeploymentHandle[Any]:
        """Handle of ``EngineReplica.lease`` of a pool."""
        return self._handles[pool].options(method_name="lease")

    def listed(self, pool: str) -> bool:
        """Whether Serve has a replica of a pool, ready or not."""
        return bool(self._listed[pool])

    def absent_pools(self, request: EngineRequest) -> list[PoolInfo]:
        """Pools without a ready engine that could serve a request if they had one."""
        tokens = len(request.prompt_token_ids) + request.max_tokens
        present = {connection.address.pool for connection in self._routed.values() if connection.ready}
        return [pool for pool in self._pools if pool.name not in present and tokens <= self._max_model_lens[pool.name]]

    def update(self, pool: str, engines: Sequence[EngineAddress]) -> None:
        """Take over Serve's new list of a pool's engines: connect to what is new, use what is gone no more."""
        if self._closed:
            return
        wanted = [engine for engine in engines if self._identity in (None, engine.identity)]
        for engine in engines:
            if engine not in wanted:
                logger.warning("Engine %s serves another model and is not used.", engine.replica_id)
        self._listed[pool] = {engine.replica_id for engine in wanted}
        for connection in self._connections.values():
            if connection.address.pool == pool:
                connection.retired = connection.address.replica_id not in self._listed[pool]
                self._note_presence(connection)
        self._note_absence()
        for engine in wanted:
            task = self._tasks.get(engine.replica_id)
            if task is None or task.done():
                task = asyncio.get_running_loop().create_task(self._stay_connected(engine))
                self._tasks[engine.replica_id] = task
                task.add_done_callback(partial(self._forget, engine.replica_id))

    async def _stay_connected(self, engine: EngineAddress) -> None:
        """Keep one engine's stream open while Serve lists it; afterwards it lasts until the replica has drained."""
        leases = self.leases(engine.pool)
        suspect = False
        while engine.replica_id in self._listed[engine.pool]:
            connection = EngineConnection(
                engine,
                leases,
                actors=self._actors,
                on_item=self._heard,
                suspect=suspect,
            )
            self._connections[engine.replica_id] = connection
            try:
                await connection.run()
            except Exception:  # Ray's head may be away, say: Serve lists the engine, so it is tried again
                logger.exception("The connection to engine %s failed.", engine.replica_id)
            finally:
                self._routed.pop(engine.replica_id, None)
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
            self._routed[address.replica_id] = connection
            self._max_model_lens[address.pool] = address.spec.max_model_len
        self._router.observe(
            address.replica_id, item.load, cached=item.cached, evicted=item.evicted, now=time.monotonic()
        )
        self._observer.loaded(address, item.load)
        self._note_presence(connection)

    def _note_presence(self, connection: EngineConnection) -> None:
        if connection.retired:
            connection.came_up = False  # it comes anew if Serve lists it again
        elif connection.ready and not connection.came_up:
            connection.came_up = True
            self.first_ready.set()
            self._room.engine_came(connection.address.start_seconds)

    def _note_absence(self) -> None:
        if not any(connection.ready for connection in self._connections.values()):
            self._room.engines_gone()

    def _forget(self, replica_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks[replica_id] is task:  # else Serve lists the replica again since the task has ended
            del self._tasks[replica_id]


async def _subscribe(handle: DeploymentHandle[Any], directory: ReplicaDirectory) -> None:
    """Bring the directory to the handle's request router, see LeaseRouter; returns once a replica is there."""
    # Without a reservation it is no queued request to Serve, which would start an engine for it.
    async with handle.choose_replica(directory, _reserve=False):
        pass
