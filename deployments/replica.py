"""EngineReplica: the Serve deployment of one pool. One replica is one engine: a placement group and its shards."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError

from deployments.config import PoolConfig
from deployments.directory import EngineAddress
from deployments.group import ShardGroup
from deployments.routing import Replica
from deployments.shard import EngineInfo
from deployments.speed import Speed
from engine.config import EngineConfig
from engine.errors import EngineDeadError

logger = logging.getLogger("ray.serve")

START_ATTEMPTS = 3
"""How often shards that die while loading are started anew before the replica gives up."""

LEASE_CHECK_S = 0.5
"""Pause between looks for leases that are over."""


class EngineReplica:
    """Starts the shards, watches them, and gives Serve what it needs to know of the engine.

    Tokens don't pass here: an ingress talks to shard 0 (see ``token_stream``). What Serve sees of a request is its
    :meth:`lease`.
    """

    group: type[ShardGroup] = ShardGroup
    """See :attr:`ShardGroup.shard`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, pool: PoolConfig, *, served_model_name: str, stalled_after_s: float
    ) -> None:
        """Start the engine and wait until the model is loaded.

        Args:
            config: of the engine; ``model`` is a folder on every node.
            pool: what to run it on.
            served_model_name: what clients call the model.
            stalled_after_s: seconds without progress after which the engine counts as dead.
        """
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._stalled_after_s = stalled_after_s
        self._leases: dict[str, asyncio.Event] = {}  # by what they are for; set to end them
        self._speed = Speed()
        started = time.monotonic()
        self._group, info = await self._start(config, pool, served_model_name)
        self._address = EngineAddress(
            spec=Replica(
                replica_id=self._replica_id,
                pool=pool.name,
                max_model_len=info.max_model_len,
                block_size=info.block_size,
                total_blocks=info.num_kv_blocks,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
            ),
            model_path=config.model,
            identity=info.identity,
            actor_name=self._group.actor_name(0),
            namespace=self._group.namespace,
            stalled_after_s=stalled_after_s,
            start_seconds=time.monotonic() - started,
        )
        self._speed.stats(await self._group.load(), now=time.monotonic())  # so that the next can tell rates
        self._tasks = [
            asyncio.create_task(self._share_fate()),
            asyncio.create_task(self._watch_progress()),
            asyncio.create_task(self._end_leases()),
        ]

    async def lease(self, name: str, *, replica_id: str) -> bool:
        """Lasts as long as the engine has what it is for, see :meth:`Fanout.under_way`.

        Not until the caller ends it: Ray may lose what cancels a call (as when Serve sends the call to the replica in
        the same turn of its loop), and callers die.

        Args:
            name: of a request, or of an ingress and all its requests.
            replica_id: the engine that has it; for ``LeaseRouter``, and another than this one ends the lease at once.
        """
        if replica_id != self._replica_id:
            return False
        await self._leases.setdefault(name, asyncio.Event()).wait()
        return True

    async def turned_away(self, prompt_tokens: int, *, replica_id: str) -> None:
        """An ingress tells of requests that no engine took; ``replica_id`` is for ``LeaseRouter``, any will do."""
        self._speed.turned_away(prompt_tokens)

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Read by Serve once the replica is up, and pushed to every handle's request router."""
        return self._address.to_metadata()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Read by Serve at each ``metrics_interval_s`` and given to the pool's autoscaling policy."""
        return self._speed.stats(await self._group.load(), now=time.monotonic())

    async def check_health(self) -> None:
        """Called by Serve every ``health.check_period_s``; :meth:`_watch_progress` knows sooner."""

    async def _start(
        self, config: EngineConfig, pool: PoolConfig, served_model_name: str
    ) -> tuple[ShardGroup, EngineInfo]:
        """Bring the shards up. What merely happened to them is tried again; what the user got wrong is not."""
        app_name = serve.get_replica_context().app_name
        attempt = 1
        while True:
            group = self.group(config, pool, name=f"{app_name}-{pool.name}-{self._replica_id}-{attempt}")
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
        self._end(await self._group.failure())

    async def _watch_progress(self) -> None:
        """End when the engine has made no step and shown no heartbeat for too long."""
        limit = self._stalled_after_s
        while True:
            await asyncio.sleep(limit / 10)
            try:
                silent_s = await asyncio.wait_for(self._group.seconds_since_progress(), limit)
            except TimeoutError:
                silent_s = limit
            except RayError:
                continue  # the shard is gone, of which _share_fate hears
            if silent_s >= limit:
                self._end(f"the engine has made no progress for {silent_s:.0f} s (limit {limit:g} s)")

    def _end(self, reason: str) -> None:
        logger.error("Engine %s stops: %s", self._replica_id, reason)
        self._group.kill_hard()
        # Not an exception: Serve would notice at its next health checks, up to three periods later.
        os._exit(1)

    async def _end_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            if not (names := list(self._leases)):
                continue
            with suppress(RayError):  # the shard is gone, of which _share_fate hears
                for name in set(names).difference(await self._group.under_way(names)):
                    self._leases.pop(name).set()
