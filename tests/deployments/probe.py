"""A Serve deployment that stands where the Ingress does and shows what an EngineClient sees."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import ray
from ray import serve

from deployments.client import ClientOptions, EngineClient
from deployments.directory import ModelInfo
from deployments.lease import open_lease
from engine.messages import EngineLoad, EngineRequest, FinishReason, TokenDelta
from engine.sampling_params import SamplingParams


def greedy(request_id: str, prompt_token_ids: list[int], max_tokens: int) -> EngineRequest:
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id, prompt_token_ids, params, max_tokens)


def sampled(
    request_id: str, prompt_token_ids: list[int], max_tokens: int, *, temperature: float, seed: int
) -> EngineRequest:
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    return EngineRequest(request_id, prompt_token_ids, params, max_tokens)


@serve.deployment(name="Probe", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Probe:
    async def __init__(self, pools: Any, options: ClientOptions) -> None:
        self._client = EngineClient(pools, options)
        await self._client.start()

    async def pid(self) -> int:
        return os.getpid()

    async def info(self) -> ModelInfo:
        return self._client.info

    async def healthy(self) -> bool:
        return self._client.healthy()

    async def loads(self) -> list[EngineLoad]:
        return self._client.load()

    async def generate(self, request: EngineRequest) -> tuple[list[int], FinishReason | None]:
        token_ids: list[int] = []
        finish_reason = None
        async for delta in self._client.generate(request):
            token_ids += delta.token_ids
            finish_reason = delta.finish_reason
        return token_ids, finish_reason

    async def generate_in(self, pool: str, request: EngineRequest) -> list[int]:
        """As :meth:`generate`, on the one engine of a pool, whatever the router would choose."""
        (connection,) = [c for c in self._client._engines if c.address.pool == pool and c.ready]
        inbox = connection.submit(request)
        token_ids: list[int] = []
        while len(token_ids) < request.max_tokens:
            token_ids += (await inbox.get()).token_ids
        connection.finish(request.request_id, abort=False)
        return token_ids

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        async for delta in self._client.generate(request):
            yield delta

    async def check(self, pool: str) -> EngineLoad:
        """Wait until the one engine of a pool is idle, and check its books; its load."""
        await self.until_idle()
        load: EngineLoad = await self._shard(pool).check.remote()
        return load

    async def shard_pid(self, pool: str) -> int:
        """The process of the one engine of a pool."""
        _, pid = await self._shard(pool).whereabouts.remote()
        return int(pid)

    async def places(self) -> dict[str, list[str]]:
        """By pool, the node of each rank of its one engine."""
        places = {}
        for state in self._client.engines():
            first = state.address.actor_name
            names = [first.removesuffix("0") + str(rank) for rank in range(8)]
            nodes = []
            with suppress(ValueError):  # no actor of that name: all ranks have been seen
                for name in names:
                    node, _ = await ray.get_actor(name, state.address.namespace).whereabouts.remote()
                    nodes.append(node)
            places[state.address.pool] = nodes
        return places

    def _shard(self, pool: str) -> Any:
        (state,) = [state for state in self._client.engines() if state.address.pool == pool and state.ready]
        return ray.get_actor(state.address.actor_name, state.address.namespace)

    async def leave_after_first(self, request: EngineRequest) -> tuple[EngineLoad, float]:
        """Close a request after its first tokens; the load while it ran, and how long its blocks took to be free."""
        stream = self._client.generate(request)
        await anext(stream)
        (during,) = self._client.load()
        left = time.monotonic()
        await stream.aclose()
        await self.until_idle()
        return during, time.monotonic() - left

    async def leases(self, request: EngineRequest) -> dict[str, bool]:
        """Open leases for a request that runs, for its ingress, and for a request and an ingress that are not there.

        Waits until the last two have ended, and when the request is over, until all have; by name, which were held when
        the last two had ended.
        """
        (connection,) = self._client._engines
        stream = self._client.generate(request)
        await anext(stream)
        names = [request.request_id, connection._name, "request that is over", "ingress that is gone"]
        replica_id = connection.address.replica_id
        leases = {name: open_lease(connection._lease_handle, name, replica_id=replica_id) for name in names}
        async with asyncio.timeout(60):
            await asyncio.gather(*(leases[name] for name in names[2:]))
            held = {name: not lease.done() for name, lease in leases.items()}
            await stream.aclose()
            await asyncio.gather(*leases.values())
        return held

    async def until_idle(self, timeout: float = 60) -> EngineLoad:
        """Wait until the one engine reports that all of its blocks are free."""
        async with asyncio.timeout(timeout):
            while True:
                for load in self._client.load():
                    if load.free_blocks == load.total_blocks and load.running_requests == 0:
                        return load
                await asyncio.sleep(0.005)  # loads come by themselves, there is nothing to wait on

    async def until_engines(self, count: int, timeout: float = 120) -> None:
        """Wait until so many engines take requests."""
        async with asyncio.timeout(timeout):
            while len(self._client.load()) != count:
                await asyncio.sleep(0.02)

    async def spread(self, requests: list[EngineRequest]) -> list[int]:
        """Send many requests in one turn of the event loop; how many went to each engine."""
        streams = [self._client.generate(request) for request in requests]
        counted: dict[int, int] = {}
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        for connection in self._client._engines:
            counted[id(connection)] = len(connection)
        await asyncio.gather(*tasks)
        for stream in streams:
            await stream.aclose()
        return sorted(counted.values())
