"""Loads over time, and the pools that meet them. Times are short, so that a run is: a day is two hours."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.autoscaling.fleet import PoolPlan
from benchmarks.routing.scenarios import A100_300B, BLOCK_SIZE, H20_300B, SHARED, Kind
from benchmarks.routing.traces import Request, Workload
from deployments.autoscaling import PoolOptions

RateOf = Callable[[float], float]
HOUR = 3600.0


@dataclass(frozen=True)
class Scenario:
    """A load and a cluster."""

    name: str
    about: str
    rate: RateOf
    """Requests a second at a time."""
    most: float
    """The greatest rate."""
    seconds: float
    pools: tuple[PoolPlan, ...]
    workload: Workload = SHARED
    kill_every_s: float | None = None

    def requests(self, *, seed: int, share: float = 1.0) -> list[Request]:
        """A trace of the first ``share`` of the time.

        Whole sessions are generated at the greatest rate; of each, the turns are kept at which the rate exceeds the
        share of it that is drawn for the session.
        """
        rng = random.Random(seed)
        drawn: dict[int, float] = {}
        every = self.workload.generate(rate=self.most, seconds=self.seconds * share, block_size=BLOCK_SIZE, seed=seed)
        return [
            request
            for request in every
            if drawn.setdefault(request.session, rng.random()) * self.most < self.rate(request.arrival_s)
        ]


def pool(kind: Kind, *, start_s: float, failed_starts: float = 0.0, **options: float) -> PoolPlan:
    """A pool of a kind of replicas; options are those of :class:`PoolOptions`."""
    ((replica, timing),) = replace(kind, count=1).replicas(32768)
    cost = {"cost": float(kind.ranks), "max_num_seqs": replica.max_num_seqs, "block_size": replica.block_size}
    made = PoolOptions(pool=kind.pool, **{**cost, "start_s": start_s, **options})  # type: ignore[arg-type]  # by name
    return PoolPlan(made, replica, timing, start_s, failed_starts, initial=made.min_replicas)


def bursts(low: float, high: float, *, seconds: float, period_s: float) -> RateOf:
    """``high`` for the last ``seconds`` of each period, ``low`` otherwise."""
    return lambda now: high if now % period_s >= period_s - seconds else low


def day(low: float, high: float, *, length_s: float) -> RateOf:
    """A cosine from ``low`` to ``high`` and back."""
    return lambda now: low + (high - low) * 0.5 * (1.0 - math.cos(2.0 * math.pi * now / length_s))


def _from_zero(now: float) -> float:
    return 4.0 if 300 <= now < 900 or 2400 <= now < 3000 else 0.0


H20 = pool(H20_300B, start_s=120, min_replicas=1, max_replicas=10)
SCENARIOS = (
    Scenario(
        "day", "a cosine from 0.5 to 5 requests/s in 2 h; replicas take 5 minutes to start",
        day(0.5, 5, length_s=2 * HOUR), 5, 2 * HOUR, (pool(H20_300B, start_s=300, min_replicas=1, max_replicas=10),),
    ),
    Scenario(
        "bursts", "1 request/s, 5 for 6 of 20 minutes", bursts(1, 5, seconds=360, period_s=1200), 5, HOUR, (H20,),
    ),
    Scenario(
        "flapping", "1 and 5 requests/s in turns, a minute each", bursts(1, 5, seconds=60, period_s=120), 5, HOUR / 2,
        (H20,),
    ),
    Scenario(
        "from zero", "nothing, 4 requests/s for 10 minutes, nothing, again", _from_zero, 4, HOUR,
        (pool(H20_300B, start_s=60, min_replicas=0, max_replicas=10),),
    ),
    Scenario(
        "failing", "3 requests/s; a replica dies every 4 minutes, a third of the starts fail", lambda now: 3.0, 3,
        HOUR / 2, (pool(H20_300B, start_s=120, min_replicas=1, max_replicas=10, failed_starts=0.33),), kill_every_s=240,
    ),
    Scenario(
        "two pools", "a cosine from 1 to 8 requests/s in 1 h; H20 (cost 1, at most 4) and A100 TP4 (cost 4)",
        day(1, 8, length_s=HOUR), 8, HOUR,
        (
            pool(H20_300B, start_s=120, min_replicas=1, max_replicas=4),
            pool(A100_300B, start_s=120, min_replicas=0, max_replicas=3),
        ),
    ),
)  # fmt: skip
