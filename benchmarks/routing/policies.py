"""Other routers' policies, as published, with the same knowledge that ours has: loads as of the last step that was
heard of, own requests that those can't include, and the exact prefix index.
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import numpy as np

from deployments.routing.prefixes import PrefixIndex
from deployments.routing.types import Choice, Job, Replica
from engine.errors import EngineDeadError
from engine.messages import EngineLoad


@dataclass(slots=True)
class _Known:
    replica: Replica
    slot: int
    load: EngineLoad | None = None
    unseen: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    """Ticket -> steps when it was sent, prompt tokens to compute, time."""
    own: dict[int, int] = field(default_factory=dict)
    """Ticket -> prompt tokens, of this ingress's requests under way."""

    @property
    def requests(self) -> int:
        load = self.load
        return (load.waiting_requests + load.running_requests if load else 0) + len(self.unseen)

    @property
    def prefill_tokens(self) -> int:
        return (self.load.waiting_prefill_tokens if self.load else 0) + sum(new for _, new, _ in self.unseen.values())

    @property
    def held_blocks(self) -> int:
        return self.load.total_blocks - self.load.free_blocks if self.load else 0


class Policy:
    """Keeps what every policy may know; a subclass says which replica."""

    name = "?"

    def __init__(self, *, seed: int) -> None:
        self.rng = random.Random(seed)
        self._known: dict[str, _Known] = {}
        self._indexes: dict[int, PrefixIndex] = {}
        self._slots = 0
        self._next = 0

    def pick(self, job: Job, known: list[_Known]) -> _Known:
        raise NotImplementedError

    def cached(self, job: Job) -> np.ndarray:
        """Cached tokens of the prompt, by slot."""
        total = np.zeros(self._slots)
        for size, index in self._indexes.items():
            depths = index.match(job.block_hashes.get(size, ()), (job.prompt_tokens - 1) // size, self._slots)
            if depths is not None:
                total += depths * size
        return total

    def add(self, replica: Replica) -> None:
        index = self._indexes.setdefault(replica.block_size, PrefixIndex())
        self._known[replica.replica_id] = _Known(replica, self._slots)
        index.open(self._slots)
        self._slots += 1

    def remove(self, replica_id: str) -> None:
        known = self._known.pop(replica_id)
        self._indexes[known.replica.block_size].clear(known.slot)

    def observe(
        self, replica_id: str, load: EngineLoad, *, cached: Iterable[bytes], evicted: Iterable[bytes], now: float
    ) -> None:
        known = self._known[replica_id]
        known.load = load
        self._indexes[known.replica.block_size].report(known.slot, cached, evicted)
        for ticket, (steps, _, sent) in list(known.unseen.items()):
            if load.steps >= steps + 2 and now >= sent + 0.01:
                del known.unseen[ticket]

    def choose(self, job: Job, *, now: float, exclude: Container[str] = ()) -> Choice:
        wanted = job.prompt_tokens + job.max_tokens
        fitting = [
            known
            for replica_id, known in self._known.items()
            if replica_id not in exclude
            and wanted <= min(known.replica.max_model_len, known.replica.total_blocks * known.replica.block_size)
        ]
        if not fitting:
            raise EngineDeadError("no replica")
        known = self.pick(job, fitting)
        self._next += 1
        cached = int(self.cached(job)[known.slot]) if self._indexes else 0
        steps = known.load.steps if known.load else 0
        known.unseen[self._next] = (steps, job.prompt_tokens - cached, now)
        known.own[self._next] = job.prompt_tokens
        hashes = job.block_hashes.get(known.replica.block_size, ())
        self._indexes[known.replica.block_size].expect(known.slot, hashes)
        return Choice(known.replica.replica_id, known.replica.pool, 0.0, 0.0, cached, self._next)

    def first_token(self, choice: Choice, *, now: float) -> None:
        if (known := self._known.get(choice.replica_id)) is not None:
            known.unseen.pop(choice.ticket, None)

    def finished(self, choice: Choice, *, tokens: int, now: float) -> None:
        if (known := self._known.get(choice.replica_id)) is not None:
            known.unseen.pop(choice.ticket, None)
            known.own.pop(choice.ticket, None)


class RoundRobin(Policy):
    name = "round robin"
    turn = 0

    def pick(self, job: Job, known: list[_Known]) -> _Known:
        self.turn += 1
        return known[self.turn % len(known)]


class LeastRequests(Policy):
    name = "least requests"

    def pick(self, job: Job, known: list[_Known]) -> _Known:
        least = min(one.requests for one in known)
        return self.rng.choice([one for one in known if one.requests == least])


class PowerOfTwo(Policy):
    """Mitzenmacher 2001; Ray Serve's default router."""

    name = "power of two"

    def pick(self, job: Job, known: list[_Known]) -> _Known:
        return min(self.rng.sample(known, min(2, len(known))), key=lambda one: one.requests)


class LMetric(Policy):
    """SGLang's "lmetric": new prefill tokens * (load + 1)."""

    name = "SGLang lmetric"

    def pick(self, job: Job, known: list[_Known]) -> _Known:
        cached = self.cached(job).tolist()
        return min(
            known,
            key=lambda one: (
                (one.prefill_tokens + job.prompt_tokens - cached[one.slot]) * (one.requests + 1),
                one.slot,
            ),
        )


class CacheAware(Policy):
    """SGLang's cache-aware policy with its defaults.

    The least loaded if loads differ by more than 64 requests and by more than a factor of 1.5; else the longest prefix
    if that is over 0.3 of the prompt; else the least loaded.
    """

    name = "SGLang cache-aware"

    def pick(self, job: Job, known: list[_Known]) -> _Known:
        loads = [one.requests for one in known]
        highest, least = max(loads), min(loads)
        if not (highest - least > 64 and highest > 1.5 * least):
            cached = self.cached(job).tolist()
            best = max(known, key=lambda one: (cached[one.slot], -one.requests, self.rng.random()))
            if cached[best.slot] > 0.3 * job.prompt_tokens:
                return best
        return min(known, key=lambda one: (one.requests, self.rng.random()))


class Dynamo(Policy):
    """Dynamo's cost, in blocks: 1.0 * (prefill queued and new, less what is cached) + blocks that decoding holds.

    ``kv-overlap-score-weight`` 1 and temperature 0, its defaults.
    """

    name = "Dynamo"

    def pick(self, job: Job, known: list[_Known]) -> _Known:
        cached = self.cached(job).tolist()

        def cost(one: _Known) -> tuple[float, float]:
            size = one.replica.block_size
            prefill = (one.prefill_tokens + job.prompt_tokens - cached[one.slot]) / size
            return max(prefill, 0.0) + one.held_blocks + job.prompt_tokens / size, self.rng.random()

        return min(known, key=cost)


POLICIES: tuple[type[Policy], ...] = (RoundRobin, LeastRequests, PowerOfTwo, LMetric, CacheAware, Dynamo)
