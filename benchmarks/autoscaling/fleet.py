"""A simulated cluster whose pools are scaled while it serves: replicas that take time to start, fail and drain.

What a policy sees is what Serve's controller would show it: the stats of ``deployments.speed`` at every
``metrics_interval_s``, ongoing requests, and its own last target. What Serve itself adds is added for all policies
alike: a pool without replicas that has requests gets one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from benchmarks.routing.engine import Running
from benchmarks.routing.hardware import Timing
from benchmarks.routing.simulator import Ingress, Outcome, Simulation, _Place, _Tag
from benchmarks.routing.traces import Request
from deployments.autoscaling import PoolOptions, PoolState, ReplicaStats
from deployments.routing import Replica
from deployments.speed import Speed

TICK_S = 1.0
"""Between two decisions. Serve takes ten a second, on the same stats."""
NEXT_POOL_AFTER_S = 30.0
"""As ``deployments.cold_start`` calls for one pool after the other."""
LOOK_BACK_S = 30.0


@dataclass(frozen=True)
class PoolPlan:
    """A pool of the simulated cluster."""

    options: PoolOptions
    replica: Replica
    timing: Timing
    start_s: float
    """Seconds that a replica really takes to start, more or less a fifth."""
    failed_starts: float = 0.0
    """Share of starts that fail in the end, and are repeated by Serve."""
    initial: int = 0


@dataclass(frozen=True)
class View:
    """A pool as a policy sees it."""

    state: PoolState
    ongoing: float
    """Requests under way or held, the mean of the last 30 s."""


class Policy(Protocol):
    """Decides for all pools; made anew for each run."""

    def decide(self, views: Sequence[View], *, now: float) -> dict[str, int]: ...


@dataclass
class _Up:
    speed: Speed
    samples: deque[tuple[float, dict[str, float]]] = field(default_factory=deque)


@dataclass
class ScaledPool:
    """The replicas of one pool over time."""

    plan: PoolPlan
    target: int
    up: dict[str, _Up] = field(default_factory=dict)
    starting: list[float] = field(default_factory=list)
    """When each will be up."""
    ongoing: deque[float] = field(default_factory=lambda: deque(maxlen=int(LOOK_BACK_S / TICK_S)))
    replica_s: float = 0.0
    changes: list[tuple[float, int]] = field(default_factory=list)
    """Targets, from when on."""
    made: int = 0


class Cluster(Simulation):
    """A simulation whose replicas come and go as a policy says."""

    def __init__(
        self,
        ingress: Ingress,
        pools: Sequence[PoolPlan],
        policy: Policy,
        *,
        seed: int,
        metrics_interval_s: float = 10.0,
    ) -> None:
        super().__init__([ingress], seed=seed)
        self.policy = policy
        self.pools = {plan.options.pool: ScaledPool(plan, plan.initial) for plan in pools}
        self.held: dict[int, tuple[Outcome, float]] = {}
        self._random = random.Random(seed)
        self._interval_s = metrics_interval_s
        self._next_sample_s = metrics_interval_s
        self._draining: dict[str, str] = {}  # pool by replica id
        self._dead: set[int] = set()  # ids of places
        self._refused_tokens = 0
        self._reports = 0
        for pool in self.pools.values():
            for _ in range(pool.plan.initial):
                self._bring_up(pool)
        self.every(TICK_S, lambda _: self._tick())

    def kill(self) -> None:
        """One replica, at random, dies; its requests begin again elsewhere, and Serve replaces it."""
        alive = [(pool, replica_id) for pool in self.pools.values() for replica_id in pool.up]
        if not alive:
            return
        pool, replica_id = self._random.choice(alive)
        del pool.up[replica_id]
        place = self.places.pop(replica_id)
        place.version += 1
        place.draining = True
        self._dead.add(id(place))
        for ingress in self.ingresses:
            ingress.remove(replica_id)
        for running in [*place.engine.running, *place.engine.waiting]:
            self._again(running)

    def _again(self, running: Running) -> None:
        tag = running.tag
        if not isinstance(tag, _Tag):
            raise TypeError(f"a request carries {tag!r}")
        tag.ingress.finished(tag.choice, tokens=0, now=self.now)
        tag.outcome.request = _admitted(tag.outcome.request)
        self._route(tag.outcome, tag.ingress)

    def _submit(self, place: _Place, running: Running) -> None:
        if id(place) in self._dead:
            self._again(running)
        else:
            super()._submit(place, running)

    def _route(self, outcome: Outcome, ingress: Ingress) -> None:
        super()._route(outcome, ingress)
        if outcome.choice is None and outcome.retry_after_s != outcome.retry_after_s:  # neither placed nor turned away
            self.held.setdefault(id(outcome), (outcome, self.now))
            outcome.request = _admitted(outcome.request)
        else:
            self.held.pop(id(outcome), None)
            if outcome.choice is None:
                self._refused_tokens += outcome.request.prompt_tokens

    def _tick(self) -> None:
        for pool in self.pools.values():
            self._start(pool)
            draining = sum(name == pool.plan.options.pool for name in self._draining.values())
            pool.replica_s += TICK_S * (len(pool.up) + len(pool.starting) + draining)
        self._report_refused()
        self._draining = {i: name for i, name in self._draining.items() if i in self.places}
        if self.now >= self._next_sample_s:
            self._next_sample_s += self._interval_s
            self._sample()
        views = [self._view(pool) for pool in self.pools.values()]
        targets = self.policy.decide(views, now=self.now)
        for name, pool in self.pools.items():
            view = next(view for view in views if view.state.options.pool == name)
            target = targets[name]
            if not pool.up and view.state.held > 0:  # Serve's own rule
                target = max(1, pool.target)
            self._aim(pool, target)

    def _report_refused(self) -> None:
        """To one replica after the other, as ``deployments.refusals`` does."""
        replicas = [up for pool in self.pools.values() for up in pool.up.values()]
        if self._refused_tokens and replicas:
            self._reports += 1
            replicas[self._reports % len(replicas)].speed.turned_away(self._refused_tokens)
            self._refused_tokens = 0

    def _sample(self) -> None:
        for pool in self.pools.values():
            for replica_id, up in pool.up.items():
                up.samples.append((self.now, up.speed.stats(self.places[replica_id].engine.load(), now=self.now)))
                while up.samples[0][0] < self.now - LOOK_BACK_S:
                    up.samples.popleft()

    def _view(self, pool: ScaledPool) -> View:
        calls = self._calls(pool)
        engines = [self.places[replica_id].engine for replica_id in pool.up]
        ongoing = calls + sum(len(e.waiting) + len(e.running) for e in engines)
        pool.ongoing.append(ongoing)
        state = PoolState(
            options=pool.plan.options,
            target=pool.target,
            replicas={
                i: ReplicaStats.of([sample for _, sample in up.samples]) if up.samples else None
                for i, up in pool.up.items()
            },
            requests=ongoing,
        )
        return View(state, sum(pool.ongoing) / len(pool.ongoing))

    def _calls(self, pool: ScaledPool) -> int:
        """Held requests that call for an engine of this pool: cheaper pools without one first, then the next."""
        if pool.up or pool.plan.options.min_replicas:
            return 0
        absent = [p for p in self.pools.values() if not p.up and p.plan.options.min_replicas == 0]
        absent.sort(key=lambda p: p.plan.options.cost)
        position = absent.index(pool)
        return sum(self.now - since >= NEXT_POOL_AFTER_S * position for _, since in self.held.values())

    def _aim(self, pool: ScaledPool, target: int) -> None:
        if target != pool.target:
            pool.changes.append((self.now, target))
            pool.target = target
        surplus = len(pool.up) + len(pool.starting) - target
        while surplus > 0 and pool.starting:
            pool.starting.pop()
            surplus -= 1
        if surplus > 0:  # as Serve: the newest go first
            for replica_id in list(pool.up)[-surplus:]:
                del pool.up[replica_id]
                self._draining[replica_id] = pool.plan.options.pool
                self.remove_replica(replica_id)
        for _ in range(-surplus):
            pool.starting.append(self.now + self._start_time(pool))

    def _start_time(self, pool: ScaledPool) -> float:
        took = pool.plan.start_s * self._random.uniform(0.8, 1.2)
        return took + self._start_time(pool) if self._random.random() < pool.plan.failed_starts else took

    def _start(self, pool: ScaledPool) -> None:
        arrived = [when for when in pool.starting if when <= self.now]
        pool.starting = [when for when in pool.starting if when > self.now]
        for _ in arrived:
            self._bring_up(pool)

    def _bring_up(self, pool: ScaledPool) -> None:
        pool.made += 1
        replica_id = f"{pool.plan.options.pool}-{pool.made}"
        pool.up[replica_id] = up = _Up(Speed())
        self.add_replica(replace(pool.plan.replica, replica_id=replica_id), pool.plan.timing)
        up.speed.stats(self.places[replica_id].engine.load(), now=self.now)


def _admitted(request: Request) -> Request:
    """The request as ``deployments.client`` routes one that was held or begun: it isn't turned away any more."""
    return replace(request, job=replace(request.job, priority=-1))
