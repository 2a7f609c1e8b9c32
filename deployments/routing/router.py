"""The router: predicts, chooses and reserves in one step."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deployments.routing.options import RoutingOptions
from deployments.routing.predict import Fleet, Prediction, Row, Vector, Work, describe, predict
from deployments.routing.prefixes import PrefixIndex
from deployments.routing.rates import PoolRates, Rates, ReplicaRates
from deployments.routing.types import Choice, Job, Replica
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.messages import EngineLoad

TRANSIT_S = 0.01
"""How long a request may be on its way to an engine; its load can't be taken to include it earlier."""
FIRST_OUTPUT = 256.0
"""Tokens an answer is taken to have until some have ended."""
OUTPUT_WEIGHT = 0.02
"""Of an answer's length in the mean of all; and of a sample in the mean number of ingresses: """
PEERS_WEIGHT = 0.01
HIT_TOKENS = 50_000
"""Looked-up tokens over which a replica's hit rate fades."""
TIME_WEIGHT = 0.02
"""Cost of a prediction that meets the limit exactly, and of as much computing: what decides while all is well, and what
makes a request go where its prefix is. Small beside a miss, which costs 1."""
LATE_WEIGHT = 0.25
"""Cost of each limit's length that a first token is predicted to be late: a miss is better a near one."""
NEAR = 0.0005
"""Costs so close are equal (50 ms of the default TTFT limit): one of them is taken at random, so that ingresses which
know the same do not do the same."""
HOPELESS_FACTOR = 1.5
HOPELESS_S = 0.2
"""A prompt that takes longer than the admission limit even where it could begin at once may take this factor of that,
and this much more."""
SLOW_FACTOR = 8.0
"""Where a token takes longer than the admission limit even for one request alone, as on many a CPU, the limit is this
factor of that: there is no service level to protect, and turning everybody but one away would help nobody."""
SURE_S = 0.1
"""Seconds of observed work from which a replica's rates are more than a guess."""
RETRY_S = (0.1, 60.0)
"""Least and most that a client is told to wait."""

Mask = NDArray[np.bool_]


@dataclass(slots=True)
class _Reservation:
    """A request of this ingress that is under way."""

    place: _Place
    prompt_tokens: int
    new_tokens: float
    steps: int
    """The replica's last known step when it was sent."""
    sent_s: float
    expected: Sequence[bytes]
    """Hashes of blocks that it will compute."""
    unseen: bool = True
    """The replica's load may lack it."""


@dataclass(eq=False, slots=True)
class _Place:
    """What is known of one replica."""

    replica: Replica
    slot: int
    index: PrefixIndex
    rates: ReplicaRates
    load: EngineLoad | None = None
    heard_s: float = -math.inf
    context: float = 0.0
    """Tokens of the cache that the last steps read, each."""
    share: float = 0.0
    """Of the past's time, spent on prompts."""
    hit_rate: float = 0.0
    unseen: dict[int, _Reservation] = field(default_factory=dict)
    waiting: dict[int, _Reservation] = field(default_factory=dict)
    """Own requests without a first token, those unseen among them; by ticket."""


class Router:
    """Sends each request where it costs least goodput.

    A request's cost on a replica is the chance that it misses the service level there, and, for each request already
    there, how much its chance grows. A chance is ``x**8 / (1 + x**8)`` of a predicted time over its limit, as
    predictions err by some 20 %. Taking the least growth of a steep convex potential is the greedy rule of Aspnes,
    Azar, Fiat, Plotkin and Waarts (JACM 1997) for jobs whose cost differs by machine, there within O(log machines) of
    the best assignment; its proof doesn't carry over to ours. A little of the time and of the work itself is added, for
    when nothing is in danger.

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
        self._fleet = Fleet()
        self._indexes: dict[int, PrefixIndex] = {}
        self._places: dict[str, _Place] = {}
        self._slots: list[_Place | None] = []
        self._vacant: list[int] = []
        self._pools: dict[str, PoolRates] = {}
        self._limits: dict[str, int] = {}
        self._tickets: dict[int, _Reservation] = {}
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
        place = _Place(replica, slot, index, rates)
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
        place.index.clear(place.slot)
        place.unseen.clear()
        place.waiting.clear()

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
        place.index.report(place.slot, cached, evicted)
        place.rates.observe(load)
        last, place.load = place.load, load
        if last is not None:
            self._follow(place, last, load, now=now)
        place.heard_s = now
        for ticket, reservation in list(place.unseen.items()):
            if load.steps < reservation.steps + 2 or now < reservation.sent_s + TRANSIT_S:
                break
            reservation.unseen = False
            del place.unseen[ticket]
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
        wanted = job.prompt_tokens + job.max_tokens
        usable = state[int(Row.LIMIT)] >= wanted
        if exclude:
            for replica_id, place in self._places.items():
                if replica_id in exclude:
                    usable[place.slot] = False
        if not usable.any():
            raise self._nowhere(job)
        cached = self._cached(job)
        told = predict(state, prompt_tokens=job.prompt_tokens, cached_tokens=cached)
        cost = self._cost(told)
        if self.options.admission and job.priority >= 0:
            usable = self._admit(told, cost, usable)
        cost = np.where(usable, cost, math.inf)
        near = np.flatnonzero(cost <= cost.min() + NEAR)
        slot = int(near[0] if len(near) == 1 else near[self._rng.randrange(len(near))])
        place_chosen = self._slots[slot]
        if place_chosen is None:
            raise RuntimeError(f"slot {slot} takes requests, and no replica has it")
        cached_tokens = float(cached if isinstance(cached, float) else cached[slot])
        return Choice(
            replica_id=place_chosen.replica.replica_id,
            pool=place_chosen.replica.pool,
            predicted_ttft_s=float(told.ttft[slot]),
            predicted_tpot_s=float(told.tpot[slot]),
            cached_tokens=int(cached_tokens),
            ticket=self._reserve(place_chosen, job, cached_tokens, now),
        )

    def first_token(self, choice: Choice, *, now: float) -> None:
        """A request's first token has come. May be called again, and need not be."""
        reservation = self._tickets.get(choice.ticket)
        if reservation is not None:
            self._has_token(choice.ticket, reservation)

    def finished(self, choice: Choice, *, tokens: int, now: float) -> None:
        """A request has ended there, in whatever way, after ``tokens`` tokens from there. May be called again."""
        reservation = self._tickets.pop(choice.ticket, None)
        if reservation is None:
            return
        self._has_token(choice.ticket, reservation)
        if tokens:
            self._mean_output += OUTPUT_WEIGHT * (tokens - self._mean_output)

    # -- choosing -----------------------------------------------------------------------------------------------------

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

    def _cost(self, told: Prediction) -> Vector:
        options, state = self.options, self._fleet.state
        ratio = told.ttft * (1.0 / options.slo_ttft_s)
        late = _chance(ratio)
        cost = _chance(told.tpot * (1.0 / options.slo_tpot_s))
        late *= 1.0 - cost
        cost += late
        missing = _chance(told.others_tpot * (1.0 / options.slo_tpot_s))
        missing *= state[int(Row.REQUESTS)]
        missing -= state[int(Row.MISSING)]
        cost += missing
        cost += told.work * (TIME_WEIGHT / options.slo_ttft_s)
        cost += ratio * TIME_WEIGHT
        ratio -= 1.0
        np.maximum(ratio, 0.0, out=ratio)
        ratio *= LATE_WEIGHT
        cost += ratio
        return cost

    def _admit(self, told: Prediction, cost: Vector, usable: Mask) -> Mask:
        """Those of ``usable`` that can serve the request within the limits."""
        options, state = self.options, self._fleet.state
        at_best = float(told.work[usable].min())
        most_ttft_s = max(options.max_ttft_s, HOPELESS_FACTOR * at_best + HOPELESS_S)
        allowed = (told.ttft <= most_ttft_s) & (told.tpot <= options.max_tpot_s) & usable
        allowed &= cost <= options.max_cost
        # An idle replica is as good as it gets.
        allowed |= (state[int(Row.REQUESTS)] < 1.0) & usable
        if not allowed.any():
            for place in self._places.values():  # a guess is no reason to refuse
                allowed[place.slot] = usable[place.slot] and place.rates.rates.seen < SURE_S
        if not allowed.any():
            alone = self._tpot_alone(usable)
            if alone > options.max_tpot_s:
                allowed = (told.ttft <= most_ttft_s) & (told.tpot <= SLOW_FACTOR * alone) & usable
        if not allowed.any():
            raise self._overloaded(told, usable, most_ttft_s)
        return allowed

    def _tpot_alone(self, usable: Mask) -> float:
        """The least time between tokens of a request that has a replica to itself."""
        rates = [place.rates.rates for place in self._places.values() if usable[place.slot]]
        return min(each.step + each.decode for each in rates)

    def _overloaded(self, told: Prediction, usable: Mask, most_ttft_s: float) -> OverloadedError:
        """When the first replica will be able to serve it.

        A queue shrinks by a second a second, and a step by one request's part whenever one of its requests ends.
        """
        state = self._fleet.state
        late = told.ttft - most_ttft_s
        each = state[Row.TPOT] / np.maximum(state[Row.REQUESTS], 1.0) + 1e-9
        surplus = np.maximum(told.tpot - self.options.max_tpot_s, 0.0) / each
        leave = surplus * state[Row.SPAN] / np.maximum(state[Row.REQUESTS], 1.0)
        wait = float(np.maximum(late, leave)[usable].min())
        wait = min(max(wait, RETRY_S[0]), RETRY_S[1])
        return OverloadedError(
            f"every engine has more to do than it can do in time; try again in {wait:.1f} s", retry_after_s=wait
        )

    def _nowhere(self, job: Job) -> RequestError | EngineDeadError:
        longest = max(self._limits.values(), default=0)
        wanted = job.prompt_tokens + job.max_tokens
        if not longest or wanted <= longest:
            return EngineDeadError("no engine for this request is running right now; one may be starting, so try again")
        too_long = job.prompt_tokens >= longest
        return RequestError(
            f"{job.prompt_tokens} prompt tokens and max_tokens={job.max_tokens} make {wanted}; the largest pool takes "
            f"{longest} tokens: "
            f"{'shorten the prompt' if too_long else f'ask for at most {longest - job.prompt_tokens} tokens'}",
            field="prompt" if too_long else "max_tokens",
            code="context_length_exceeded",
        )

    # -- reservations -------------------------------------------------------------------------------------------------

    def _reserve(self, place: _Place, job: Job, cached_tokens: float, now: float) -> int:
        hashes = job.block_hashes.get(place.replica.block_size, ())
        reservation = _Reservation(
            place,
            prompt_tokens=job.prompt_tokens,
            new_tokens=job.prompt_tokens - cached_tokens,
            steps=place.load.steps if place.load is not None else 0,
            sent_s=now,
            expected=hashes[int(cached_tokens) // place.replica.block_size :],
        )
        self._next_ticket += 1
        ticket = self._next_ticket
        self._tickets[ticket] = place.unseen[ticket] = place.waiting[ticket] = reservation
        place.index.expect(place.slot, reservation.expected)
        total = float(self._fleet.state[int(Row.REQUESTS)].sum()) + 1.0
        self._peers += PEERS_WEIGHT * (max(total / len(self._tickets), 1.0) - self._peers)
        self._refresh(place)
        return ticket

    def _has_token(self, ticket: int, reservation: _Reservation) -> None:
        """Its prompt is computed (or it is gone): no longer waiting there."""
        place = reservation.place
        if place.waiting.pop(ticket, None) is not None:
            place.unseen.pop(ticket, None)
            place.index.unexpect(place.slot, reservation.expected)
            self._refresh(place)

    def _follow(self, place: _Place, last: EngineLoad, load: EngineLoad, *, now: float) -> None:
        """What the difference of two loads tells of the present."""
        steps = load.steps - last.steps
        if steps > 0:
            place.context = max(load.context_tokens - last.context_tokens, 0) / steps
        queried = load.queried_tokens - last.queried_tokens
        if queried > 0:
            hits = (load.cached_tokens - last.cached_tokens) / queried
            place.hit_rate += (hits - place.hit_rate) * -math.expm1(-queried / HIT_TOKENS)
        past_s = now - place.heard_s
        if past_s > 0.0:
            spent = (load.prefill_tokens - last.prefill_tokens) * place.rates.rates.prefill / past_s
            span = float(self._fleet.columns[Row.SPAN, place.slot])
            place.share += (min(max(spent, 0.0), 1.0) - place.share) * -math.expm1(-past_s / span)

    def _refresh(self, place: _Place) -> None:
        """Bring a replica's column up to date: its load, and what has been sent since."""
        replica, load = place.replica, place.load
        queued = context = 0.0
        for reservation in place.unseen.values():
            queued += reservation.new_tokens
            context += reservation.prompt_tokens
        queued *= self._peers
        context *= self._peers
        requests = len(place.unseen) * self._peers
        free = float(replica.total_blocks)
        if load is not None:
            # The engine counts whole prompts, as it can't know what it will find cached; of our own we know it.
            prompts = load.waiting_prefill_tokens
            if prompts:
                for reservation in place.waiting.values():
                    if not reservation.unseen:
                        prompts -= reservation.prompt_tokens
                        queued += reservation.new_tokens
                queued += max(prompts, 0) * (1.0 - place.hit_rate)
            here = load.running_requests + load.waiting_requests
            requests += here
            context += place.context if here else 0.0
            free = float(load.free_blocks)
        if self._slots[place.slot] is place:
            work = Work(
                queued_tokens=queued,
                requests=requests,
                context_tokens=context,
                free_blocks=free,
                past_share=place.share,
                output_tokens=self._mean_output,
            )
            column = describe(replica, place.rates.rates, work)
            power = (column[Row.TPOT] / self.options.slo_tpot_s) ** 8
            column[Row.MISSING] = requests * power / (1.0 + power)
            self._fleet.columns[:, place.slot] = column


def _chance(ratio: Vector) -> Vector:
    """That a time predicted as ``ratio`` of its limit will exceed it."""
    power = ratio * ratio
    power *= power
    power *= power
    power /= power + 1.0
    return power
