"""An ingress through all that can go wrong between it and its engines, in any order.

The client, its connections and the engines' fan-out are the real ones. Clock, network, Serve and what engines compute
are simulated, so a failure is a list of events that goes the same way each time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.deployments.simulated.clock import SimulatedLoop
from tests.deployments.simulated.cluster import Cluster, Reader
from tests.deployments.simulated.wire import Wire

MANY = st.integers(0, 30)
"""The number of one of some things; it wraps around."""


class Weather(RuleBasedStateMachine):
    """What happens to the cluster; each rule is one event. In the end it all calms down."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=SimulatedLoop)
        self.play(self.begin())

    def play(self, events: Coroutine[Any, Any, None]) -> None:
        self.runner.run(events)

    async def begin(self) -> None:
        self.cluster = Cluster()
        self.cluster.start_engine()
        self.cluster.start_engine()

    def teardown(self) -> None:
        try:
            self.play(self.end())
        finally:
            self.runner.close()

    async def end(self) -> None:
        await self.cluster.calm_down()
        self.tokens_are_those_of_one_engine()
        self.cluster.check_nothing_is_left()
        await self.cluster.close()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        assert not loop.complaints

    @invariant()
    def tokens_are_those_of_one_engine(self) -> None:
        """In order, none repeated, none lost; and all of them, for who hasn't left."""
        for reader in self.cluster.readers:
            reader.check()

    # -- clients ------------------------------------------------------------------------------------------------------

    @rule(max_tokens=st.lists(st.integers(1, 12), min_size=1, max_size=3), pause_s=st.sampled_from([0.0, 0.0, 3.0]))
    def come(self, max_tokens: list[int], pause_s: float) -> None:
        async def event() -> None:
            for number in max_tokens:
                self.cluster.read(max_tokens=number, pause_s=pause_s)

        self.play(event())

    @precondition(lambda self: self.reading)
    @rule(which=MANY)
    def leaves(self, which: int) -> None:
        async def event() -> None:
            self.reading[which % len(self.reading)].leave()

        self.play(event())

    # -- engines ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.cluster.engines)
    @rule(where=MANY, passed_over=st.sets(st.integers(0, 5)))
    def makes_a_step(self, where: int, passed_over: set[int]) -> None:
        async def event() -> None:
            self.wire(where).step(passed_over=passed_over)

        self.play(event())

    @precondition(lambda self: len(self.cluster.engines) < 3)
    @rule()
    def comes_up(self) -> None:
        async def event() -> None:
            self.cluster.start_engine()

        self.play(event())

    @precondition(lambda self: self.cluster.engines)
    @rule(where=MANY, serve_hears=st.booleans())
    def dies(self, where: int, serve_hears: bool) -> None:
        async def event() -> None:
            self.wire(where).die()
            if serve_hears:
                self.cluster.look()

        self.play(event())

    # -- the network --------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(wire.under_way for wire in self.cluster.engines.values()))
    @rule(where=MANY, which=MANY)
    def a_call_goes_on(self, where: int, which: int) -> None:
        async def event() -> None:
            wires = [wire for wire in self.cluster.engines.values() if wire.under_way]
            await wires[where % len(wires)].go_on(which)

        self.play(event())

    @precondition(lambda self: self.cluster.engines)
    @rule(where=MANY, seconds=st.sampled_from([1.0, 20.0]), mends=st.booleans())
    def network_is_cut(self, where: int, seconds: float, mends: bool) -> None:
        async def event() -> None:
            wire = self.wire(where)
            wire.set_reachable(False)
            await asyncio.sleep(seconds)
            wire.set_reachable(mends)

        self.play(event())

    @rule(is_away=st.booleans())
    def head_changes(self, is_away: bool) -> None:
        self.cluster.network.head_is_away = is_away

    # -- Serve --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.cluster.engines)
    @rule(where=MANY)
    def lists_or_drains(self, where: int) -> None:
        """As an update, or the autoscaler, or a controller that starts anew has it."""

        async def event() -> None:
            names = list(self.cluster.engines)
            self.cluster.list_engines({*self.cluster.listed} ^ {names[where % len(names)]})

        self.play(event())

    # -- time ---------------------------------------------------------------------------------------------------------

    @rule(times=st.integers(1, 8))
    def turns(self, times: int) -> None:
        """Of the event loop."""

        async def event() -> None:
            for _ in range(times):
                await asyncio.sleep(0)

        self.play(event())

    @rule(seconds=st.sampled_from([0.2, 1.0, 6.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        """Replicas and Serve look after their things, and engines say that they are there."""

        async def event() -> None:
            await asyncio.sleep(seconds)
            self.cluster.look()

        self.play(event())

    # -- helpers ------------------------------------------------------------------------------------------------------

    @property
    def reading(self) -> list[Reader]:
        return [reader for reader in self.cluster.readers if not reader.done]

    def wire(self, where: int) -> Wire:
        return list(self.cluster.engines.values())[where % len(self.cluster.engines)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Losses are what this is about; what is logged of them would fill a disk."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


TestWeather = Weather.TestCase
TestWeather.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
