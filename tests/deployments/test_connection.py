"""An ingress's connection to an engine over a transport that keeps no order, as Ray keeps none between two calls of an
actor with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import GetTimeoutError, RayError

from deployments import connection as module
from deployments.config import FailoverConfig
from deployments.connection import EngineConnection
from deployments.directory import EngineAddress, PoolInfo
from deployments.engines import Engines
from deployments.observer import Observer
from deployments.routing import Replica, Router, RoutingOptions
from deployments.shard import Shard
from deployments.token_stream import Fanout
from deployments.waiting_room import WaitingRoom
from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.messages import EngineLoad, EngineRequest
from engine.sampling_params import SamplingParams

LOAD = EngineLoad(0, 0, 0, 100, 100, steps=1, step_seconds=0.01)
ADDRESS = EngineAddress(
    spec=Replica("e", "cpu", 64, 16, 100, 8, 64),
    model_path="",
    identity="",
    actor_name="shard",
    namespace="",
    stalled_after_s=60,
    start_seconds=1.0,
)


def request(number: int) -> EngineRequest:
    return EngineRequest(f"r{number}", [1, 2, 3], SamplingParams(seed=0), 20)


class Running:
    """What a shard needs of its engine; knows which requests it has."""

    def __init__(self) -> None:
        self.ids: set[str] = set()

    def submit(self, requests: list[EngineRequest]) -> None:
        self.ids |= {one.request_id for one in requests}

    def abort(self, request_ids: list[str]) -> None:
        self.ids -= set(request_ids)


class Stream:
    """A streaming call: items as something to await."""

    def __init__(self, items: AsyncIterator[bytes]) -> None:
        self._items = items
        self._next: asyncio.Future[bytes] | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Awaitable[bytes]:
        self._next = asyncio.ensure_future(anext(self._items))  # type: ignore[arg-type]  # a coroutine, as it happens
        await asyncio.wait([self._next])
        if self._next.cancelled():
            raise StopAsyncIteration
        return self._next

    def cancel(self) -> None:
        if self._next is not None:
            self._next.cancel()


class Method:
    """A method of the actor: a call waits until the test lets it arrive, or begins at once."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, **_: Any) -> Method:
        return self

    def remote(self, *args: Any) -> Any:
        return self._call(*args)


class Leases:
    """Serve's handle for leases; these last."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def remote(self, name: str, *, replica_id: str) -> asyncio.Future[None]:
        self.opened.append(name)
        return asyncio.get_running_loop().create_future()


class Wire:
    """Ray, as far as a connection uses it, with one real shard at the other end. Calls arrive when the test says so."""

    def __init__(self) -> None:
        self.engine = Running()
        self.leases = Leases()
        self.shard = Shard(EngineConfig(model=""), rank=0)
        self.fanout = Fanout(asyncio.get_running_loop(), LOAD)
        self.shard._engine, self.shard._fanout = self.engine, self.fanout  # type: ignore[assignment]  # a stand-in
        self.under_way: list[tuple[Callable[[], Awaitable[None]], asyncio.Future[None]]] = []
        self.submit = Method(lambda *args: self._call(lambda: self.shard.submit(*args)))
        self.abort = Method(lambda *args: self._call(lambda: self.shard.abort(*args)))
        self.tether = Method(asyncio.get_running_loop().create_future)
        self.stream = Method(lambda *args: Stream(self.shard.stream(*args)))

    def get_actor(self, name: str, namespace: str) -> Wire:
        return self

    def cancel(self, call: Any) -> None:
        call.cancel()

    def _call(self, arrive: Callable[[], Awaitable[None]]) -> asyncio.Future[None]:
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.under_way.append((arrive, reply))
        return reply

    async def deliver(self, number: int) -> None:
        """Let one of the calls under way arrive, and its reply come back."""
        arrive, reply = self.under_way.pop(number % len(self.under_way))
        try:
            await arrive()
        except EngineDeadError as error:
            reply.set_exception(RayError(str(error)))
        else:
            reply.set_result(None)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def connected(wire: Wire) -> AsyncIterator[EngineConnection]:
    """A connection that has heard its engine, and that is left in the end."""
    heard = asyncio.Event()
    leases: Any = wire.leases
    connection = EngineConnection(ADDRESS, leases, ingress_id="i", on_item=lambda *_: heard.set())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ray", wire)
        reading = asyncio.ensure_future(connection.run())
        try:
            await asyncio.wait_for(heard.wait(), 10)
            yield connection
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await settle()


@given(st.lists(st.tuples(st.sampled_from(["submit", "finish", "deliver", "turn"]), st.integers(0, 50)), max_size=40))
@settings(deadline=None, max_examples=150)
def test_an_engine_has_what_its_ingress_wants_of_it_and_nothing_else(script: list[tuple[str, int]]) -> None:
    """Requests come and go while calls are under way, which arrive in any order."""

    async def run() -> None:
        wire = Wire()
        wanted: list[str] = []
        async with connected(wire) as connection:
            for number, (what, which) in enumerate(script):
                if what == "submit":
                    connection.submit(request(number))
                    wanted.append(f"r{number}")
                elif what == "finish" and wanted:
                    connection.finish(wanted.pop(which % len(wanted)), abort=True)
                elif what == "deliver" and wire.under_way:
                    await wire.deliver(which)
                elif what == "turn":
                    await settle()
            await settle()
            while wire.under_way:
                await wire.deliver(-1)
            assert wire.engine.ids == set(wanted)
            assert set(wire.fanout.under_way([f"r{number}" for number in range(len(script))])) == set(wanted)
        assert wire.engine.ids == set()

    asyncio.run(run())


def test_a_call_of_a_connection_that_was_left_begins_nothing_on_the_next() -> None:
    """As when an engine's process stood still: its ingress gives it up, comes back, and then all calls arrive."""

    async def run() -> None:
        wire = Wire()
        async with connected(wire) as connection:
            connection.submit(request(1))
            await settle()
        async with connected(wire) as connection:
            await wire.deliver(0)
            assert wire.engine.ids == set()
        async with connected(wire) as connection:
            connection.submit(request(2))
            await settle()
            await wire.deliver(0)
            assert wire.engine.ids == {"r2"}
        assert wire.engine.ids == set()

    asyncio.run(run())


@pytest.mark.parametrize("ends", [False, True], ids=["under way", "lost"])
def test_no_lease_is_opened_for_a_lost_engine(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """It would go to another replica, or make Serve start one. The request is not over: its client reads slowly."""
    for pause in ("LEASE_AFTER_S", "REQUEST_LEASE_AFTER_S"):
        monkeypatch.setattr(module, pause, 0.01)

    async def run() -> None:
        wire = Wire()
        async with connected(wire) as connection:
            connection.submit(request(1))
            await settle()
            if not ends:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        assert len(wire.leases.opened) == (0 if ends else 2), wire.leases.opened

    asyncio.run(run())


class Handle:
    """Serve's handle of a pool, of which nothing is asked here."""

    def options(self, **_: Any) -> Handle:
        return self


class Restarting(Wire):
    """Ray whose head node is away for the first calls: the directory of actors does not say no, it does not answer."""

    unanswered = 2

    def get_actor(self, name: str, namespace: str) -> Wire:
        if self.unanswered:
            self.unanswered -= 1
            raise GetTimeoutError("probably because the GCS server is dead or under high load")
        return self


def test_an_engine_is_connected_to_again_whatever_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.engines.RECONNECT_S", 0.0)

    async def run() -> None:
        monkeypatch.setattr(module, "ray", Restarting())
        engines = Engines(
            {"cpu": Handle()},  # type: ignore[dict-item]  # stands in for Serve's
            [PoolInfo("cpu", 64, on_demand=False)],
            identity=None,
            ingress_id="i",
            router=Router(RoutingOptions(), seed=0),
            room=WaitingRoom(FailoverConfig()),
            observer=Observer(),
        )
        engines.update("cpu", [ADDRESS])
        await asyncio.wait_for(engines.first_ready.wait(), 5)
        await engines.close()
        await settle()

    asyncio.run(run())
