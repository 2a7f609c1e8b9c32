"""Engines, ingresses and requests by discrete events. Replicas may come and go while it runs.

    simulation = Simulation([Router(RoutingOptions(), seed=0)])
    simulation.add_replica(replica, timing)
    simulation.every(5.0, lambda simulation: ...)      # an autoscaler's turn
    outcomes = simulation.run(requests)

An ingress is anything with the methods of :class:`Ingress`, which are those of :class:`deployments.routing.Router`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.routing.engine import Running, SimulatedEngine
from benchmarks.routing.hardware import Timing
from benchmarks.routing.traces import Request
from deployments.routing.types import Choice, Job, Replica
from engine.errors import EngineDeadError, OverloadedError
from engine.messages import EngineLoad

RETRY_S = 0.25
"""How long a request is held that comes while no replica is up."""


class Ingress(Protocol):
    """What takes requests and sends them to replicas."""

    def add(self, replica: Replica) -> None: ...
    def remove(self, replica_id: str) -> None: ...
    def observe(
        self, replica_id: str, load: EngineLoad, *, cached: Iterable[bytes], evicted: Iterable[bytes], now: float
    ) -> None: ...
    def choose(self, job: Job, *, now: float, exclude: Container[str] = ()) -> Choice: ...
    def first_token(self, choice: Choice, *, now: float) -> None: ...
    def finished(self, choice: Choice, *, tokens: int, now: float) -> None: ...


@dataclass(slots=True)
class Outcome:
    """What became of a request."""

    request: Request
    choice: Choice | None = None
    """None if it was turned away."""
    retry_after_s: float = math.nan
    ttft_s: float = math.nan
    e2e_s: float = math.nan
    cached_tokens: int = 0

    @property
    def tpot_s(self) -> float:
        """Seconds between its later tokens, on average; 0 if there is only one."""
        later = self.request.output_tokens - 1
        return (self.e2e_s - self.ttft_s) / later if later else 0.0


@dataclass(slots=True)
class _Place:
    engine: SimulatedEngine
    version: int = 0
    """Of the event at which the step under way ends; older events are void."""
    draining: bool = False


@dataclass(slots=True)
class _Tag:
    outcome: Outcome
    ingress: Ingress
    choice: Choice


@dataclass(slots=True)
class Simulation:
    """Runs a trace.

    Attributes:
        ingresses: each takes an equal share of the requests, at random, and hears of every replica's loads.
        submit_s: from choice to engine.
        report_s: from the end of a step until ingresses know of it.
        seed: of the ingresses' shares.
    """

    ingresses: Sequence[Ingress]
    submit_s: float = 0.002
    report_s: float = 0.002
    seed: int = 0
    now: float = 0.0
    places: dict[str, _Place] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _open: int = 0
    """Requests that are not complete."""

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Do something at a time; equal times in the order of asking."""
        heapq.heappush(self._events, (when, next(self._order), act))

    def every(self, period_s: float, act: Callable[[Simulation], None]) -> None:
        """Do something again and again, as long as requests are under way or to come."""

        def turn() -> None:
            act(self)
            if self._open:
                self.at(self.now + period_s, turn)

        self.at(self.now + period_s, turn)

    def add_replica(self, replica: Replica, timing: Timing) -> None:
        """From now on there is one more."""
        self.places[replica.replica_id] = place = _Place(SimulatedEngine(replica, timing))
        for ingress in self.ingresses:
            ingress.add(replica)
        self._report(place)

    def remove_replica(self, replica_id: str) -> None:
        """Send nothing more to a replica; it goes when it has finished what it has."""
        place = self.places[replica_id]
        place.draining = True
        for ingress in self.ingresses:
            ingress.remove(replica_id)
        self._retire(place)

    def run(self, requests: Sequence[Request], *, progress: Callable[[int], None] | None = None) -> list[Outcome]:
        """Simulate until every request is complete; outcomes are in the order of ``requests`` (by arrival)."""
        rng = random.Random(self.seed)
        outcomes = [Outcome(request) for request in requests]
        self._open = len(requests)
        arriving = iter(outcomes)

        def arrive(outcome: Outcome) -> None:
            following = next(arriving, None)
            if following is not None:
                self.at(following.request.arrival_s, lambda: arrive(following))
            if progress is not None:
                progress(1)
            self._route(outcome, rng.choice(self.ingresses))

        begin = next(arriving, None)
        if begin is not None:
            self.at(begin.request.arrival_s, lambda: arrive(begin))
        events = self._events
        while events:
            self.now, _, act = heapq.heappop(events)
            act()
        return outcomes

    def _route(self, outcome: Outcome, ingress: Ingress) -> None:
        request = outcome.request
        try:
            choice = ingress.choose(request.job, now=self.now)
        except OverloadedError as error:
            outcome.retry_after_s = error.retry_after_s
            self._open -= 1
            return
        except EngineDeadError:
            self.at(self.now + RETRY_S, lambda: self._route(outcome, ingress))
            return
        outcome.choice = choice
        running = Running(request.prompt_tokens, request.output_tokens, request.hashes, _Tag(outcome, ingress, choice))
        place = self.places[choice.replica_id]
        self.at(self.now + self.submit_s, lambda: self._submit(place, running))

    def _submit(self, place: _Place, running: Running) -> None:
        place.engine.add(running)
        if not place.engine.busy:
            self._begin(place)
        elif (end := place.engine.cut(self.now)) is not None:
            self._end_at(place, end)

    def _begin(self, place: _Place) -> None:
        end = place.engine.begin(self.now)
        if end is not None:
            self._end_at(place, end)

    def _end_at(self, place: _Place, end: float) -> None:
        place.version += 1
        version = place.version

        def ended() -> None:
            if place.version == version:
                self._end(place)

        self.at(end, ended)

    def _end(self, place: _Place) -> None:
        first, done = place.engine.end(self.now)
        for running in first:
            tag = running.tag
            assert isinstance(tag, _Tag)
            tag.outcome.ttft_s = self.now - tag.outcome.request.arrival_s
            tag.outcome.cached_tokens = running.cached_tokens
            tag.ingress.first_token(tag.choice, now=self.now)
        for running in done:
            tag = running.tag
            assert isinstance(tag, _Tag)
            tag.outcome.e2e_s = self.now - tag.outcome.request.arrival_s
            tag.ingress.finished(tag.choice, tokens=running.output_tokens, now=self.now)
            self._open -= 1
        self._report(place)
        self._begin(place)
        self._retire(place)

    def _report(self, place: _Place) -> None:
        load = place.engine.load()
        cached, evicted = place.engine.changes()
        replica_id = place.engine.replica.replica_id

        def heard() -> None:
            if not place.draining:
                for ingress in self.ingresses:
                    ingress.observe(replica_id, load, cached=cached, evicted=evicted, now=self.now)

        if self.report_s:
            self.at(self.now + self.report_s, heard)
        else:
            heard()

    def _retire(self, place: _Place) -> None:
        engine = place.engine
        if place.draining and not (engine.busy or engine.waiting or engine.running):
            self.places.pop(engine.replica.replica_id, None)
