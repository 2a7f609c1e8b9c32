"""What an ingress knows of one replica: its loads, what their differences tell, and the requests it has sent there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deployments.routing.predict import Work
from deployments.routing.prefixes import PrefixIndex
from deployments.routing.rates import ReplicaRates
from deployments.routing.types import Job, Replica
from engine.messages import EngineLoad

TRANSIT_S = 0.01
"""How long a request may be on its way to an engine; its load can't be taken to include it earlier."""
HIT_TOKENS = 50_000
"""Looked-up tokens over which a replica's hit rate fades."""


@dataclass(slots=True)
class Reservation:
    """A request of this ingress that is under way."""

    place: Place
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
class Place:
    """What is known of one replica."""

    replica: Replica
    slot: int
    """Its column of the fleet's state, and its number in the index."""
    index: PrefixIndex
    rates: ReplicaRates
    load: EngineLoad | None = None
    heard_s: float = -math.inf
    context: float = 0.0
    """Tokens of the cache that the last steps read, each."""
    share: float = 0.0
    """Of the past's time, spent on prompts."""
    hit_rate: float = 0.0
    unseen: dict[int, Reservation] = field(default_factory=dict)
    waiting: dict[int, Reservation] = field(default_factory=dict)
    """Own requests without a first token, those unseen among them; by ticket."""

    def observe(
        self, load: EngineLoad, *, cached: Iterable[bytes], evicted: Iterable[bytes], span_s: float, now: float
    ) -> None:
        """Take note of a report, see :meth:`Router.observe`; ``span_s`` is how long a request decodes here."""
        self.index.report(self.slot, cached, evicted)
        self.rates.observe(load)
        last, self.load = self.load, load
        if last is not None:
            self._follow(last, load, span_s=span_s, now=now)
        self.heard_s = now
        for ticket, reservation in list(self.unseen.items()):
            if load.steps < reservation.steps + 2 or now < reservation.sent_s + TRANSIT_S:
                break
            reservation.unseen = False
            del self.unseen[ticket]

    def reserve(self, ticket: int, job: Job, *, cached_tokens: float, now: float) -> Reservation:
        """Count a request here, as it is being sent."""
        hashes = job.block_hashes.get(self.replica.block_size, ())
        reservation = Reservation(
            self,
            prompt_tokens=job.prompt_tokens,
            new_tokens=job.prompt_tokens - cached_tokens,
            steps=self.load.steps if self.load is not None else 0,
            sent_s=now,
            expected=hashes[int(cached_tokens) // self.replica.block_size :],
        )
        self.unseen[ticket] = self.waiting[ticket] = reservation
        self.index.expect(self.slot, reservation.expected)
        return reservation

    def computed(self, ticket: int) -> bool:
        """A request's prompt is computed (or it is gone), so it doesn't wait here any more; whether it did."""
        reservation = self.waiting.pop(ticket, None)
        if reservation is None:
            return False
        self.unseen.pop(ticket, None)
        self.index.unexpect(self.slot, reservation.expected)
        return True

    def close(self) -> None:
        """The replica is gone; so is what was expected of it."""
        self.index.clear(self.slot)
        self.unseen.clear()
        self.waiting.clear()

    def work(self, *, peers: float, output_tokens: float) -> Work:
        """What it has to do: its load, and what has been sent since, by each of so many ingresses."""
        queued = context = 0.0
        for reservation in self.unseen.values():
            queued += reservation.new_tokens
            context += reservation.prompt_tokens
        queued *= peers
        context *= peers
        requests = len(self.unseen) * peers
        free = float(self.replica.total_blocks)
        if (load := self.load) is not None:
            # The engine counts whole prompts, as it can't know what it will find cached; of our own we know it.
            prompts = load.waiting_prefill_tokens
            if prompts:
                for reservation in self.waiting.values():
                    if not reservation.unseen:
                        prompts -= reservation.prompt_tokens
                        queued += reservation.new_tokens
                queued += max(prompts, 0) * (1.0 - self.hit_rate)
            here = load.running_requests + load.waiting_requests
            requests += here
            context += self.context if here else 0.0
            free = float(load.free_blocks)
        return Work(
            queued_tokens=queued,
            requests=requests,
            context_tokens=context,
            free_blocks=free,
            past_share=self.share,
            output_tokens=output_tokens,
        )

    def _follow(self, last: EngineLoad, load: EngineLoad, *, span_s: float, now: float) -> None:
        """What the difference of two loads tells of the present."""
        steps = load.steps - last.steps
        if steps > 0:
            self.context = max(load.context_tokens - last.context_tokens, 0) / steps
        queried = load.queried_tokens - last.queried_tokens
        if queried > 0:
            hits = (load.cached_tokens - last.cached_tokens) / queried
            self.hit_rate += (hits - self.hit_rate) * -math.expm1(-queried / HIT_TOKENS)
        past_s = now - self.heard_s
        if past_s > 0.0:
            spent = (load.prefill_tokens - last.prefill_tokens) * self.rates.rates.prefill / past_s
            self.share += (min(max(spent, 0.0), 1.0) - self.share) * -math.expm1(-past_s / span_s)
