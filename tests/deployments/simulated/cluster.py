"""An ingress and its engines, on a clock and a network of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import aclosing
from functools import partial

from deployments.client import ClientOptions, EngineClient
from deployments.config import FailoverConfig
from deployments.directory import EngineAddress, ModelInfo, PoolInfo
from deployments.engines import Engines
from deployments.routing import Replica, RoutingOptions
from engine.messages import EngineRequest, FinishReason
from engine.sampling_params import SamplingParams
from tests.deployments.simulated.clock import settle
from tests.deployments.simulated.handle import Handle
from tests.deployments.simulated.toy_engine import true_token
from tests.deployments.simulated.wire import Network, Wire

POOL = "cpu"
NO_END_OF_PATIENCE = FailoverConfig(max_losses=10_000, max_losses_in_all=10_000, hold_s=1e6)


def address(name: str) -> EngineAddress:
    """Of an engine whose replica and shard have that name."""
    return EngineAddress(
        spec=Replica(name, POOL, 64, 16, 100, 8, 64),
        model_path="",
        identity="",
        actor_name=name,
        namespace="",
        stalled_after_s=60,
        start_seconds=1.0,
    )


class Reader:
    """A client of the server, and what it has got so far."""

    def __init__(self, client: EngineClient, number: int, *, max_tokens: int, pause_s: float) -> None:
        self.request = EngineRequest(f"r{number}", [1, 2, 3], SamplingParams(seed=number), max_tokens)
        self.left = False
        self._tokens: list[int] = []
        self._reasons: list[FinishReason | None] = []
        self._pause_s = pause_s
        self._reading = asyncio.ensure_future(self._read(client))

    @property
    def done(self) -> bool:
        return self._reading.done()

    def leave(self) -> None:
        self.left = True
        self._reading.cancel()

    def check(self) -> None:
        """What has come is what one engine alone would have given; all of it, if this is over."""
        truth = [true_token(self.request.params.seed, position) for position in range(self.request.max_tokens)]
        assert self._tokens == truth[: len(self._tokens)], self.request.request_id
        if self.done and not self.left:
            self._reading.result()
            assert self._tokens == truth, self.request.request_id
            assert self._reasons[-1] == FinishReason.LENGTH
            assert not any(self._reasons[:-1])

    async def _read(self, client: EngineClient) -> None:
        async with aclosing(client.generate(self.request)) as deltas:
            async for delta in deltas:
                self._tokens += delta.token_ids
                self._reasons.append(delta.finish_reason)
                await asyncio.sleep(self._pause_s)


class Cluster:
    """All of it; made on the loop that it lives on."""

    def __init__(self) -> None:
        self.network = Network()
        self.handle = Handle()
        self.listed: list[str] = []
        """What Serve lists, by name."""
        self.readers: list[Reader] = []
        options = ClientOptions(
            info=ModelInfo("", "", 64, 0),
            identity=None,
            pools=(PoolInfo(POOL, 64, on_demand=True),),
            routing=RoutingOptions(),
            failover=NO_END_OF_PATIENCE,
        )
        self.client = EngineClient(
            {POOL: self.handle},  # type: ignore[dict-item]  # stands in for Serve's
            options,
            engines=partial(Engines, actors=self.network),
        )

    @property
    def engines(self) -> dict[str, Wire]:
        """Those whose process is there, by name."""
        return {name: wire for name, wire in self.network.wires.items() if not wire.dead}

    def start_engine(self) -> None:
        name = f"engine-{len(self.network.wires)}"
        self.network.wires[name] = Wire()
        self.list_engines({*self.listed, name})

    def list_engines(self, names: Collection[str]) -> None:
        """Serve tells of its replicas."""
        self.listed = sorted(names)
        self.client._engines.update(POOL, [address(name) for name in self.listed])

    def look(self) -> None:
        """What Serve and its replicas do now and then."""
        self.handle.look({name: wire.fanout.under_way for name, wire in self.engines.items()})
        if any(name not in self.engines for name in self.listed):
            self.list_engines([name for name in self.listed if name in self.engines])

    def read(self, *, max_tokens: int, pause_s: float) -> None:
        self.readers.append(Reader(self.client, len(self.readers), max_tokens=max_tokens, pause_s=pause_s))

    async def calm_down(self, *, limit_s: int = 200) -> None:
        """Let nothing else go wrong until every reader has what it wants.

        Raises:
            AssertionError: one of them waits in vain.
        """
        self.network.head_is_away = False
        for wire in self.engines.values():
            wire.set_reachable(True)
        if not self.engines:
            self.start_engine()
        self.list_engines(self.engines)
        for second in range(10):
            await self._calm_second(late=1 if second < 5 else 0, working=False)
        self.check_engines_have_what_is_wanted()
        for _ in range(limit_s):
            if all(reader.done for reader in self.readers):
                break
            await self._calm_second()
        waiting = [reader.request.request_id for reader in self.readers if not reader.done]
        assert not waiting, f"{waiting} wait in vain"
        for _ in range(5):
            await self._calm_second()

    def check_engines_have_what_is_wanted(self) -> None:
        """When all calls have arrived: what a reader waits for is on one engine at most, and nothing else on any."""
        running = [attempt.partition("~")[0] for wire in self.engines.values() for attempt in wire.engine.ids]
        assert len(set(running)) == len(running), running
        assert set(running) <= {reader.request.request_id for reader in self.readers if not reader.done}, running

    def check_nothing_is_left(self) -> None:
        """When all readers are done: no engine works for nobody, and nobody waits for nothing."""
        for name, wire in self.engines.items():
            assert not wire.engine.ids, name
            assert not wire.fanout.under_way([*wire.engine.has_had, *wire.connections]), name
            assert not wire.under_way, name
        assert self.client._router.reserved == 0
        assert self.client.held == 0
        assert not any(len(connection) for connection in self.client._engines)
        assert not self.handle.open

    async def close(self) -> None:
        """Close the client, after which nothing of it goes on."""
        await self.client.close()
        for wire in self.engines.values():
            while wire.under_way:
                await wire.deliver()
        await settle()
        loop = asyncio.get_running_loop()
        assert asyncio.all_tasks(loop) == {asyncio.current_task()}

    async def _calm_second(self, *, late: int = 0, working: bool = True) -> None:
        """Nothing is lost any more, but what was sent last comes first, and so many calls don't come yet."""
        nobody, everybody = (), range(1000)
        for wire in list(self.engines.values()):
            while len(wire.under_way) > late:
                await wire.deliver(-1)
            wire.step(passed_over=nobody if working else everybody)
        await asyncio.sleep(0.5)
        self.look()
        await asyncio.sleep(0.5)
