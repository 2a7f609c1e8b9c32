"""Asks engines for the tokens that each of their experts has had, and sums them over the replicas of a pool."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from ray.exceptions import RayError

from deployments.actors import Actors
from deployments.directory import EngineAddress

logger = logging.getLogger(__name__)

Layers = dict[int, list[int]]
"""By MoE layer, the tokens of each expert."""
Ask = Callable[[EngineAddress], Awaitable[Layers | None]]

TIMEOUT_S = 5.0

REMEMBERED = 16
"""Replicas that are away whose last counts are kept: one that was only lost for a while must not count twice."""

AT_ONCE = 8
"""Engines asked in one round. With more, each gets its turn every few rounds."""


class ExpertLoads:
    """Tokens of each expert by pool, since this ingress first heard of each replica.

    An engine that counts nothing is asked once.

    Args:
        ask: how an engine is asked; it answers None if it does not count.
    """

    def __init__(self, ask: Ask | None = None) -> None:
        self._ask = ask or _Shards()
        self._pools: dict[str, Layers] = {}
        self._last: dict[str, Layers] = {}  # by replica id, the one asked last at the end
        self._silent: set[str] = set()
        self._queue: list[str] = []

    @property
    def pools(self) -> dict[str, Layers]:
        """By pool and layer."""
        return self._pools

    async def poll(self, engines: Iterable[EngineAddress]) -> None:
        """Ask the engines whose turn it is; what doesn't answer is left for the next round."""
        known = {engine.replica_id: engine for engine in engines}
        self._silent &= known.keys()
        for replica_id in [replica_id for replica_id in self._last if replica_id not in known][:-REMEMBERED]:
            del self._last[replica_id]
        self._queue = [replica_id for replica_id in self._queue if replica_id in known]
        self._queue += [replica_id for replica_id in known if replica_id not in self._queue]
        turn = [replica_id for replica_id in self._queue if replica_id not in self._silent][:AT_ONCE]
        self._queue = [replica_id for replica_id in self._queue if replica_id not in turn] + turn
        await asyncio.gather(*(self._update(known[replica_id]) for replica_id in turn))

    async def _update(self, engine: EngineAddress) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                layers = await self._ask(engine)
        except (RayError, ValueError, TimeoutError) as error:  # ValueError: there is no actor of that name any more
            logger.debug("engine %s does not tell the load of its experts: %s", engine.replica_id, error)
            return
        if layers is None:
            self._silent.add(engine.replica_id)
            return
        pool = self._pools.setdefault(engine.pool, {})
        before = self._last.pop(engine.replica_id, {})
        for layer, tokens in layers.items():
            sums = pool.setdefault(layer, [0] * len(tokens))
            earlier = before.get(layer, [0] * len(tokens))
            pool[layer] = [total + new - old for total, new, old in zip(sums, tokens, earlier, strict=True)]
        self._last[engine.replica_id] = layers


class _Shards:
    """Asks the engines' shards 0."""

    def __init__(self) -> None:
        self._actors = Actors()

    async def __call__(self, engine: EngineAddress) -> Layers | None:
        shard = await self._actors.find(engine.actor_name, engine.namespace)
        layers: Layers | None = await shard.expert_load.remote()
        return layers
