"""How a request that waits makes a pool which is scaled to zero start an engine."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Self

from deployments.engines import Engines
from deployments.lease import hold_lease
from engine.messages import EngineRequest

NEXT_POOL_AFTER_S = 30.0
"""Time that a pool which is scaled to zero has to start an engine, until the next such pool is asked as well."""

CALL_AGAIN_S = 1.0
"""Pause between calls to a pool."""


class ColdStart:
    """The calls for an engine that one request makes; ``with ColdStart(...)`` ends them."""

    def __init__(self, engines: Engines, request: EngineRequest) -> None:
        self._engines = engines
        self._request = request
        self._calls: dict[str, asyncio.Task[None]] = {}  # by pool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for call in self._calls.values():
            call.cancel()

    def call(self, *, waited_s: float) -> None:
        """Call to the pools that should start an engine for a request which has waited so long.

        That is one of those that could serve it, and more as time goes by.
        """
        pools = [pool.name for pool in self._engines.absent_pools(self._request) if pool.on_demand]
        for pool in pools[: 1 + int(waited_s // NEXT_POOL_AFTER_S)]:
            if pool not in self._calls:
                # In an empty context: see open_lease.
                self._calls[pool] = asyncio.create_task(self._keep_calling(pool), context=contextvars.Context())

    async def _keep_calling(self, pool: str) -> None:
        """Let Serve know of a request that waits: a call to a pool without replicas is what makes it start one.

        The call ends when the pool has a replica. That one may be gone before it is of any use, and nothing would start
        another, so this lasts until the request has found a place.
        """
        leases = self._engines.leases(pool)
        while True:
            if not self._engines.listed(pool):
                await hold_lease(leases, self._request.request_id, replica_id="")
            await asyncio.sleep(CALL_AGAIN_S)
