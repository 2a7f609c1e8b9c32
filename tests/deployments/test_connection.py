"""An ingress's connection to an engine over a transport that keeps no order, as Ray keeps none between two calls of an
actor with an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.actors import LOOKUPS_AT_ONCE, Actors
from deployments.config import FailoverConfig
from deployments.connection import LEASE_AFTER_S, REQUEST_LEASE_AFTER_S, EngineConnection
from deployments.directory import PoolInfo
from deployments.engines import Engines
from deployments.observer import Observer
from deployments.routing import Router, RoutingOptions
from deployments.waiting_room import WaitingRoom
from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.simulated.clock import settle, simulate
from tests.deployments.simulated.cluster import POOL, address
from tests.deployments.simulated.handle import Handle
from tests.deployments.simulated.wire import Network, Wire


def request(number: int) -> EngineRequest:
    return EngineRequest(f"r{number}", [1, 2, 3], SamplingParams(seed=0), 20)


@asynccontextmanager
async def connected(wire: Wire, leases: Any = None) -> AsyncIterator[EngineConnection]:
    """A connection that has heard its engine, and that is left in the end."""
    network = Network()
    network.wires["e"] = wire
    heard = asyncio.Event()
    connection = EngineConnection(address("e"), leases or Handle(), actors=network, on_item=lambda *_: heard.set())
    reading = asyncio.ensure_future(connection.run())
    try:
        await heard.wait()
        yield connection
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await settle()


async def all_arrives(wire: Wire) -> None:
    """The last call first."""
    while wire.under_way:
        await wire.deliver(-1)
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
            await all_arrives(wire)
            assert wire.engine.ids == set(wanted)
            assert set(wire.fanout.under_way([f"r{number}" for number in range(len(script))])) == set(wanted)
        await all_arrives(wire)
        assert wire.engine.ids == set()

    simulate(run())


def test_a_call_of_a_connection_that_was_left_begins_nothing_on_the_next() -> None:
    """As when an engine's process stood still: its ingress gives it up, comes back, and then all calls arrive."""

    async def run() -> None:
        wire = Wire()
        async with connected(wire) as connection:
            connection.submit(request(1))
            await settle()
        late = wire.under_way.pop(0)
        await all_arrives(wire)
        async with connected(wire) as connection:
            wire.under_way.append(late)
            await all_arrives(wire)
            assert wire.engine.ids == set()
            connection.submit(request(2))
            await settle()
            await all_arrives(wire)
            assert wire.engine.ids == {"r2"}
        await all_arrives(wire)
        assert wire.engine.ids == set()

    simulate(run())


@pytest.mark.parametrize("ends", [False, True], ids=["under way", "lost"])
def test_no_lease_is_opened_for_a_lost_engine(ends: bool) -> None:
    """It would go to another replica, or make Serve start one. The request is not over: its client reads slowly."""

    async def run() -> None:
        leases = Handle()
        async with connected(Wire(), leases) as connection:
            connection.submit(request(1))
            await settle()
            if not ends:
                await asyncio.sleep(LEASE_AFTER_S + REQUEST_LEASE_AFTER_S)
        await asyncio.sleep(LEASE_AFTER_S + REQUEST_LEASE_AFTER_S)
        assert len(leases.leases) == (0 if ends else 2)

    simulate(run())


def engines_of(actors: Actors, room: WaitingRoom | None = None) -> Engines:
    return Engines(
        {POOL: Handle()},  # type: ignore[dict-item]  # stands in for Serve's
        [PoolInfo(POOL, 64, on_demand=False)],
        identity=None,
        router=Router(RoutingOptions(), seed=0),
        room=WaitingRoom(FailoverConfig()) if room is None else room,
        observer=Observer(),
        actors=actors,
    )


def test_an_engine_is_connected_to_again_whatever_went_wrong() -> None:
    """Ray's head node is away at first: its directory of actors does not say no, it does not answer."""

    async def run() -> None:
        network = Network()
        network.wires["e"] = Wire()
        network.head_is_away = True
        engines = engines_of(network)
        engines.update(POOL, [address("e")])
        await asyncio.sleep(10)
        assert not engines.first_ready.is_set()
        network.head_is_away = False
        await asyncio.wait_for(engines.first_ready.wait(), 5)
        await engines.close()

    simulate(run())


@pytest.mark.parametrize("turns", range(5))
def test_an_engine_that_is_listed_again_is_connected_to_again(turns: int) -> None:
    """In whichever turn of the event loop since the connection ended. It would not be until Serve's next news."""

    async def run() -> None:
        network = Network()
        wire = network.wires["e"] = Wire()
        engines = engines_of(network)
        engines.update(POOL, [address("e")])
        await engines.first_ready.wait()
        engines.update(POOL, [])
        wire.die()
        while list(engines):
            await asyncio.sleep(0)
        network.wires["e"] = Wire()
        for _ in range(turns):
            await asyncio.sleep(0)
        engines.update(POOL, [address("e")])
        await asyncio.sleep(1)
        assert [connection.ready for connection in engines] == [True]
        await engines.close()

    simulate(run())


def test_who_waits_is_told_of_a_draining_engine_that_is_listed_again() -> None:
    async def run() -> None:
        network = Network()
        network.wires["e"] = Wire()
        room = WaitingRoom(FailoverConfig())
        engines = engines_of(network, room)
        engines.update(POOL, [address("e")])
        await engines.first_ready.wait()
        engines.update(POOL, [])
        waiting = asyncio.ensure_future(room.wait(since=time.monotonic(), admitted=True))
        await settle()
        assert not waiting.done()
        engines.update(POOL, [address("e")])
        await settle()
        assert waiting.done()
        await engines.close()

    simulate(run())


def test_other_threads_are_free_while_the_directory_of_actors_does_not_answer() -> None:
    """Some lost engines, and a head node that is away: prompts are still tokenized."""
    answers = threading.Event()

    class Silent(Actors):
        def _look_up(self, name: str, namespace: str) -> Any:
            answers.wait(20)
            raise ValueError("no actor")

    async def run() -> None:
        engines = engines_of(Silent())
        engines.update(POOL, [address(f"e{number}") for number in range(64)])
        try:
            await asyncio.sleep(0)
            await asyncio.wait_for(asyncio.to_thread(len, "prompt"), 5)
            assert sum(thread.name.startswith("actors") for thread in threading.enumerate()) <= LOOKUPS_AT_ONCE
        finally:
            answers.set()
            await engines.close()

    asyncio.run(run())
