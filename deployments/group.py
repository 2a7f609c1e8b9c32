"""ShardGroup: the shards of one engine, seen from the EngineReplica that owns them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.config import PoolConfig
from deployments.shard import EngineInfo, Shard
from engine.config import EngineConfig
from engine.errors import DibitError, EngineDeadError
from engine.messages import EngineLoad

logger = logging.getLogger("ray.serve")

MAX_CALLS = 10_000
"""Calls that a shard's event loop holds at once: a submit for each turn of each ingress, its stream, its tether."""


class ShardGroup:
    """Starts one actor for each rank in the placement group of this process, and watches them.

    The actors are not detached: Ray ends them when this process ends, whatever ends it.
    """

    shard: type[Shard] = Shard
    """What is started. A benchmark's group has a subclass here, whose engine only keeps time."""

    def __init__(self, config: EngineConfig, pool: PoolConfig, *, name: str) -> None:
        """Create the actors; bundle ``rank + 1`` of the placement group is for each (bundle 0 holds this process)."""
        self.namespace: str = ray.get_runtime_context().namespace
        self._name = name
        self._shards: list[ActorHandle[Any]] = []
        self._watches: list[asyncio.Future[None]] = []
        self._whereabouts: list[tuple[str, int]] = []
        placement_group = get_current_placement_group()
        if placement_group is None:
            raise RuntimeError("an EngineReplica needs placement_group_bundles, see deployments.placement")
        actor: Any = ray.remote(self.shard)
        for rank in range(pool.tensor_parallel_size):
            options: dict[str, Any] = {
                "name": self.actor_name(rank),
                # In a bundle with a GPU, a request for CPUs would look for them in another bundle.
                "num_cpus": 0 if pool.accelerator_type else pool.cpus_per_rank,
                "num_gpus": 1 if pool.accelerator_type else 0,
                "max_restarts": 0,
                "max_concurrency": MAX_CALLS,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    placement_group, placement_group_bundle_index=rank + 1
                ),
            }
            self._shards.append(actor.options(**options).remote(config, rank=rank))

    def actor_name(self, rank: int) -> str:
        """Name of a shard's actor in :attr:`namespace`."""
        return f"{self._name}-shard-{rank}"

    async def start(self, served_model_name: str) -> EngineInfo:
        """Load the model on all ranks.

        Raises:
            DibitError: the model or the options are wrong; the text is for the user.
            EngineDeadError: a rank died while it was loading.
        """
        # Watched from here on, so a rank that dies while others wait for it in a collective ends the wait.
        for shard in self._shards:
            tether: Any = shard.tether.remote()
            self._watches.append(asyncio.ensure_future(_as_future(shard.watch.remote([tether]))))
        started = asyncio.ensure_future(self._start(served_model_name))
        waiting: list[asyncio.Future[Any]] = [started, *self._watches]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            started.cancel()
            raise EngineDeadError(await self.failure())
        try:
            return started.result()
        except RayTaskError as error:
            if isinstance(error.cause, DibitError):
                raise error.cause from None
            raise
        except RayError as error:
            raise EngineDeadError(f"a rank died while the model was loading: {error}") from None

    async def _start(self, served_model_name: str) -> EngineInfo:
        self._whereabouts = await asyncio.gather(*(shard.whereabouts.remote() for shard in self._shards))
        meeting = await self._shards[0].meeting.remote() if len(self._shards) > 1 else None
        await asyncio.gather(*(shard.load.remote(meeting, served_model_name) for shard in self._shards))
        infos: list[EngineInfo] = await asyncio.gather(*(shard.join.remote(meeting) for shard in self._shards))
        return infos[0]

    def kill(self) -> None:
        """End all shards now."""
        for watch in self._watches:
            watch.cancel()
        for shard in self._shards:
            ray.kill(shard)

    def kill_hard(self) -> None:
        """End all shards now, whatever they hang in: those of this node with SIGKILL, which needs no answer of theirs.

        Those of other nodes are killed by Ray there.
        """
        for node_id, pid in self._whereabouts:
            if node_id == ray.get_runtime_context().get_node_id():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for shard in self._shards:
            ray.kill(shard)

    async def failure(self) -> str:
        """Wait until a shard fails; what happened to it."""
        done, _ = await asyncio.wait(self._watches, return_when=asyncio.FIRST_COMPLETED)
        rank = min(self._watches.index(watch) for watch in done)
        error = self._watches[rank].exception()
        if isinstance(error, RayTaskError) and isinstance(error.cause, DibitError):
            return f"rank {rank} failed: {error.cause}"
        if isinstance(error, RayActorError):
            return f"rank {rank} died (its process ended; the raylet's log may say why)"
        return f"rank {rank} failed: {error}"

    async def seconds_since_progress(self) -> float:
        """Seconds since the engine finished a step or showed a heartbeat."""
        return float(await self._shards[0].seconds_since_progress.remote())

    async def load(self) -> EngineLoad:
        """The engine's load after its last step."""
        load: EngineLoad = await self._shards[0].load_now.remote()
        return load

    async def under_way(self, names: list[str]) -> list[str]:
        """Those of some requests and ingresses that the engine is at work for, see :meth:`Fanout.under_way`."""
        found: list[str] = await self._shards[0].under_way.remote(names)
        return found


async def _as_future(reference: Any) -> None:
    await reference
