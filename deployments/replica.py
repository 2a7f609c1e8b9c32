"""EngineReplica: the Serve deployment of one pool. One replica is one engine: a placement group and its shards."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from ray import serve

from deployments.config import PoolConfig
from deployments.directory import EngineAddress, ModelInfo
from deployments.group import ShardGroup
from deployments.shard import EngineInfo
from engine.config import EngineConfig
from engine.errors import EngineDeadError

logger = logging.getLogger("ray.serve")

START_ATTEMPTS = 3
"""How often shards that die while loading are started anew before the replica gives up."""


class EngineReplica:
    """Starts the shards, watches them, and gives Serve what it needs to know of the engine.

    Tokens don't pass here: an ingress talks to shard 0 (see ``token_stream``). What Serve sees of a request is its
    :meth:`lease`.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, pool: PoolConfig, *, served_model_name: str, created: int, stalled_after_s: float
    ) -> None:
        """Start the engine and wait until the model is loaded.

        Args:
            config: of the engine; ``model`` is a folder on every node.
            pool: what to run it on.
            served_model_name: what clients call the model.
            created: Unix time in seconds to tell clients.
            stalled_after_s: seconds without progress after which the engine counts as dead.
        """
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._stalled_after_s = stalled_after_s
        self._listeners: dict[str, asyncio.Event] = {}  # by ingress id; set when the ingress is gone
        self._group, info = await self._start(config, pool, served_model_name)
        self._address = EngineAddress(
            replica_id=self._replica_id,
            actor_name=self._group.actor_name(0),
            namespace=self._group.namespace,
            stalled_after_s=stalled_after_s,
            info=ModelInfo(
                model_path=config.model,
                served_model_name=served_model_name,
                max_model_len=info.max_model_len,
                block_size=info.block_size,
                created=created,
            ),
        )
        self._tasks = [
            asyncio.create_task(self._share_fate()),
            asyncio.create_task(self._end_leases_of_the_departed()),
        ]

    async def lease(self, request_id: str, *, ingress_id: str, replica_id: str) -> bool:
        """Lasts as long as the request, whose end cancels it; returns if the ingress is gone, or it isn't for us."""
        if replica_id != self._replica_id:
            return False
        await self._listeners.setdefault(ingress_id, asyncio.Event()).wait()
        return True

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Read by Serve once the replica is up, and pushed to every handle's request router."""
        return self._address.to_metadata()

    async def check_health(self) -> None:
        """Called by Serve every ``health.check_period_s``.

        Raises:
            RuntimeError: the engine has shown no progress for too long. Serve replaces the replica then.
        """
        idle = await self._group.seconds_since_progress()
        if idle > self._stalled_after_s:
            raise RuntimeError(
                f"the engine has not finished a step for {idle:.0f} s (limit {self._stalled_after_s:.0f} s)"
            )

    async def _start(
        self, config: EngineConfig, pool: PoolConfig, served_model_name: str
    ) -> tuple[ShardGroup, EngineInfo]:
        """Bring the shards up. What merely happened to them is tried again; what the user got wrong is not."""
        app_name = serve.get_replica_context().app_name
        attempt = 1
        while True:
            group = ShardGroup(config, pool, name=f"{app_name}-{pool.name}-{self._replica_id}-{attempt}")
            try:
                return group, await group.start(served_model_name)
            except EngineDeadError as error:
                group.kill()
                if attempt == START_ATTEMPTS:
                    raise
                logger.warning("Engine %s did not start, trying again: %s", self._replica_id, error)
                attempt += 1
            except BaseException:
                group.kill()
                raise

    async def _share_fate(self) -> None:
        """End this process at once when a shard fails; Ray ends the other shards with it, and Serve replaces it."""
        reason = await self._group.failure()
        logger.error("Engine %s stops: %s", self._replica_id, reason)
        # Not an exception: Serve would notice at its next health checks, up to three periods later.
        os._exit(1)

    async def _end_leases_of_the_departed(self) -> None:
        async for ingress_id in self._group.departures():
            if (departed := self._listeners.pop(ingress_id, None)) is not None:
                departed.set()
