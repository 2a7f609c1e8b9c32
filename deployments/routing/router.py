"""The router: predicts, chooses and reserves in one step."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Iterable

import numpy as np

from deployments.routing import cost
from deployments.routing.admission import Admission, Mask
from deployments.routing.options import RoutingOptions
from deployments.routing.place import Place, Reservation
from deployments.routing.predict import Fleet, Row, Vector, describe, predict
from deployments.routing.prefixes import PrefixIndex
from deployments.routing.rates import PoolRates, Rates, ReplicaRates
from deployments.routing.types import Choice, Job, Replica
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineLoad

FIRST_OUTPUT = 256.0
"""Tokens an answer is taken to have until some have ended."""
OUTPUT_WEIGHT = 0.02
"""Of an answer's length in the mean of all; and of a sample in the mean number of ingresses: """
PEERS_WEIGHT = 0.01
NEAR = 0.0005
"""Costs so close are equal (50 ms of the default TTFT limit): one of them is taken at random, so that ingresses which
know the same do not do the same."""


class Router:
    """Sends each request where it costs least goodput (:mod:`deployments.routing.cost`).

    A request is counted where it was sent until that replica's load surely includes it (two steps later), and, as other
    ingresses that know the same send theirs likewise, as often as there seem to be ingresses.

    Not thread-safe. No method's time depends on the number of requests under way elsewhere. ``now`` is any clock in
    seconds that doesn't go back, the same for all calls.

    Args:
        options: the service level, and what is turned away.
        seed: of the choice among near-equals; give each ingress its own. Equal seeds and calls give equal choices.
    """

    def __init__(self, options: RoutingOptions, *, seed: int) -> None:
        self.options = options
        self._rng = random.Random(seed)
        self._admission = Admission(options)
        self._fleet = Fleet()
        self._indexes: dict[int, PrefixIndex] = {}
        self._places: dict[str, Place] = {}
        self._slots: list[Place | None] = []
        self._vacant: list[int] = []
        self._pools: dict[str, PoolRates] = {}
        self._limits: dict[str, int] = {}
        self._tickets: dict[int, Reservation] = {}
        self._next_ticket = 0
        self._mean_output = FIRST_OUTPUT
        self._peers = 1.0

    @property
    def block_sizes(self) -> frozenset[int]:
        """Of all pools that there are or were: for these a :class:`Job` should bring hashes."""
        return frozenset(self._indexes)

    @property
    def reserved(self) -> int:
        """Requests that were chosen for and have not been :meth:`finished`."""
        return len(self._tickets)

    # -- replicas -----------------------------------------------------------------------------------------------------

    def add(self, replica: Replica) -> None:
        """A replica is up, and idle until its first load says otherwise. One of the same id is replaced."""
        self.remove(replica.replica_id)
        slot = self._vacant.pop() if self._vacant else self._fleet.open()
        if slot == len(self._slots):
            self._slots.append(None)
        index = self._indexes.setdefault(replica.block_size, PrefixIndex())
        index.open(slot)
        rates = ReplicaRates(self._pools.setdefault(replica.pool, PoolRates()), forget_s=self.options.forget_after_s)
        place = Place(replica, slot, index, rates)
        self._places[replica.replica_id] = self._slots[slot] = place
        self._refresh(place)
        self._limits[replica.pool] = int(self._fleet.columns[Row.LIMIT, slot])

    def remove(self, replica_id: str) -> None:
        """A replica is gone, or takes no more requests; unknown ids are no error. Those under way end as they do."""
        place = self._places.pop(replica_id, None)
        if place is None:
            return
        self._slots[place.slot] = None
        self._vacant.append(place.slot)
        self._fleet.columns[:, place.slot] = 0.0
        place.close()

    def observe(
        self,
        replica_id: str,
        load: EngineLoad,
        *,
        cached: Iterable[bytes] = (),
        evicted: Iterable[bytes] = (),
        now: float,
    ) -> None:
        """A replica has reported a step (or several). Reservations that its load surely includes fall away.

        Args:
            replica_id: a replica that is not known (any more) is ignored.
            load: its load.
            cached: hashes of blocks that have become findable since the report before.
            evicted: hashes of blocks that can't be found any more.
            now: seconds.
        """
        place = self._places.get(replica_id)
        if place is None:
            return
        span_s = float(self._fleet.columns[Row.SPAN, place.slot])
        place.observe(load, cached=cached, evicted=evicted, span_s=span_s, now=now)
        self._refresh(place)

    def rates(self, replica_id: str) -> Rates:
        """What has been learned of a replica; its pool's rates as long as that is little.

        Raises:
            KeyError: there is no such replica.
        """
        return self._places[replica_id].rates.rates

    # -- requests -----------------------------------------------------------------------------------------------------

    def choose(self, job: Job, *, now: float, exclude: Container[str] = ()) -> Choice:
        """Choose a replica and reserve its place there.

        Args:
            job: what is asked for.
            now: seconds.
            exclude: replica ids to leave out, such as those that have just failed this request.

        Raises:
            RequestError: the request fits no pool that there is or was.
            EngineDeadError: no replica that it fits is up.
            OverloadedError: it could not be served in time anywhere, and admission is on.
        """
        state = self._fleet.state
        usable = self._usable(job, exclude)
        if not usable.any():
            raise self._nowhere(job)
        cached = self._cached(job)
        told = predict(state, prompt_tokens=job.prompt_tokens, cached_tokens=cached)
        costs = cost.costs(state, told, self.options)
        if self.options.admission and job.priority >= 0:
            usable = self._admission.admit(state, told, costs, usable=usable, places=self._places.values())
        costs = np.where(usable, costs, math.inf)
        near = np.flatnonzero(costs <= costs.min() + NEAR)
        slot = int(near[0] if len(near) == 1 else near[self._rng.randrange(len(near))])
        place = self._slots[slot]
        if place is None:
            raise RuntimeError(f"slot {slot} takes requests, and no replica has it")
        cached_tokens = float(cached if isinstance(cached, float) else cached[slot])
        return Choice(
            replica_id=place.replica.replica_id,
            pool=place.replica.pool,
            predicted_ttft_s=float(told.ttft[slot]),
            predicted_tpot_s=float(told.tpot[slot]),
            cached_tokens=int(cached_tokens),
            ticket=self._reserve(place, job, cached_tokens, now),
        )

    def first_token(self, choice: Choice, *, now: float) -> None:
        """A request's first token has come. May be called again, and need not be."""
        reservation = self._tickets.get(choice.ticket)
        if reservation is not None:
            self._computed(choice.ticket, reservation)

    def finished(self, choice: Choice, *, tokens: int, now: float) -> None:
        """A request has ended there, in whatever way, after ``tokens`` tokens from there. May be called again."""
        reservation = self._tickets.pop(choice.ticket, None)
        if reservation is None:
            return
        self._computed(choice.ticket, reservation)
        if tokens:
            self._mean_output += OUTPUT_WEIGHT * (tokens - self._mean_output)

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _usable(self, job: Job, exclude: Container[str]) -> Mask:
        """The replicas that a request fits, without those left out."""
        usable: Mask = self._fleet.state[int(Row.LIMIT)] >= job.prompt_tokens + job.max_tokens
        if exclude:
            for replica_id, place in self._places.items():
                if replica_id in exclude:
                    usable[place.slot] = False
        return usable

    def _cached(self, job: Job) -> Vector | float:
        """Prompt tokens that each replica has cached, the last token never among them."""
        total: Vector | float = 0.0
        for block_size, index in self._indexes.items():
            hashes = job.block_hashes.get(block_size)
            if hashes:
                depths = index.match(hashes, (job.prompt_tokens - 1) // block_size, self._fleet.size)
                if depths is not None:
                    depths *= block_size
                    total = depths if isinstance(total, float) else total + depths
        return total

    def _nowhere(self, job: Job) -> RequestError | EngineDeadError:
        longest = max(self._limits.values(), default=0)
        if not longest or job.prompt_tokens + job.max_tokens <= longest:
            return EngineDeadError("no engine for this request is running right now; one may be starting, so try again")
        return RequestError.too_long(job.prompt_tokens, job.max_tokens, limit=longest, whose="the largest pool takes")

    # -- reservations -------------------------------------------------------------------------------------------------

    def _reserve(self, place: Place, job: Job, cached_tokens: float, now: float) -> int:
        self._next_ticket += 1
        ticket = self._next_ticket
        self._tickets[ticket] = place.reserve(ticket, job, cached_tokens=cached_tokens, now=now)
        total = float(self._fleet.state[int(Row.REQUESTS)].sum()) + 1.0
        self._peers += PEERS_WEIGHT * (max(total / len(self._tickets), 1.0) - self._peers)
        self._refresh(place)
        return ticket

    def _computed(self, ticket: int, reservation: Reservation) -> None:
        place = reservation.place
        if place.computed(ticket):
            self._refresh(place)

    def _refresh(self, place: Place) -> None:
        """Bring a replica's column up to date."""
        if self._slots[place.slot] is place:
            work = place.work(peers=self._peers, output_tokens=self._mean_output)
            column = describe(place.replica, place.rates.rates, work)
            column[Row.MISSING] = cost.missing(work.requests, column[Row.TPOT], self.options)
            self._fleet.columns[:, place.slot] = column
