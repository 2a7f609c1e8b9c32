"""Requests without an engine call for one, for as long as they have none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from deployments.client import ClientOptions, EngineClient
from deployments.config import FailoverConfig
from deployments.directory import EngineAddress, ModelInfo, PoolInfo
from deployments.engines import Engines
from deployments.routing import Replica, RoutingOptions
from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams


def address(pool: str) -> EngineAddress:
    return EngineAddress(
        spec=Replica(f"{pool}-1", pool, 64, 16, 100, 8, 64),
        model_path="",
        identity="",
        actor_name="",
        namespace="",
        stalled_after_s=60,
        start_seconds=7.0,
    )


class Call:
    """A call of a Serve handle under way, as far as leases use it."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self.answer = asyncio.get_running_loop().create_future()
        self.cancelled = False

    def __await__(self) -> Any:
        return self.answer.__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Serve's handle of a pool, which is told by the test what Serve would do."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.called = asyncio.Event()

    def options(self, *, method_name: str) -> Handle:
        assert method_name == "lease"
        return self

    def remote(self, name: str, *, replica_id: str) -> Call:
        self.calls.append(Call(replica_id))
        self.called.set()
        return self.calls[-1]

    async def next_call(self) -> Call:
        await asyncio.wait_for(self.called.wait(), 10)
        self.called.clear()
        return self.calls[-1]


class Unheard(Engines):
    """Engines of which nothing is ever heard."""

    async def _stay_connected(self, engine: EngineAddress) -> None:
        await asyncio.Event().wait()


class Client(EngineClient):
    """Knows of engines what the test lists."""

    def __init__(self, handles: dict[str, Handle]) -> None:
        pools = tuple(PoolInfo(name, 64, on_demand=True) for name in handles)
        options = ClientOptions(ModelInfo("", "", 64, 0), None, pools, RoutingOptions(), FailoverConfig())
        super().__init__(handles, options, engines=Unheard)  # type: ignore[arg-type]  # stand in for Serve's


async def scenario(play: Callable[[Client, dict[str, Handle]], Any], *pools: str) -> None:
    handles = {name: Handle() for name in pools}
    client = Client(handles)
    request = EngineRequest("r", [1, 2, 3], SamplingParams(), 20)
    waiting = asyncio.ensure_future(anext(client.generate(request)))
    try:
        await play(client, handles)
        assert not waiting.done()
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0)  # what it has cancelled ends
        assert all(call.cancelled for handle in handles.values() for call in handle.calls)
        await client.close()


def test_an_engine_that_came_and_went_is_called_for_again() -> None:
    async def play(client: Client, handles: dict[str, Handle]) -> None:
        handle = handles["lazy"]
        first = await handle.next_call()
        client._engines.update("lazy", [address("lazy")])
        first.answer.set_result(False)
        client._engines.update("lazy", [])
        again = await handle.next_call()
        assert again is not first
        assert first.cancelled
        assert not again.cancelled

    asyncio.run(scenario(play, "lazy"))


def test_a_call_that_fails_is_repeated() -> None:
    from ray.exceptions import RayActorError

    async def play(client: Client, handles: dict[str, Handle]) -> None:
        (await handles["lazy"].next_call()).answer.set_exception(RayActorError())
        await handles["lazy"].next_call()

    asyncio.run(scenario(play, "lazy"))


def test_one_pool_is_called_at_first() -> None:
    async def play(client: Client, handles: dict[str, Handle]) -> None:
        await handles["cheap"].next_call()
        assert handles["dear"].calls == []

    asyncio.run(scenario(play, "cheap", "dear"))


def test_a_pool_that_cannot_hold_the_request_keeps_no_other_from_being_called() -> None:
    """An engine's memory may hold less than its options promise, which is known when it is up."""

    async def play(client: Client, handles: dict[str, Handle]) -> None:
        await handles["small"].next_call()
        client._engines._max_model_lens["small"] = 16
        client._room.engine_came(1.0)
        await handles["large"].next_call()

    asyncio.run(scenario(play, "small", "large"))
