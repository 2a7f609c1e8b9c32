"""A pool under a load that follows a formula, for tests of the plan: replicas share it equally."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deployments.autoscaling import Memory, PoolOptions, PoolState, ReplicaStats, plan
from deployments.autoscaling.state import Speed

SPEED = Speed(step=0.01, prefill=1e-3, decode=1e-3, context=0.0)
TOKENS = 800.0
"""Prompt tokens a second that fill a replica up to ``target_utilization``."""


def stats(replicas_worth: float, *, speed: Speed | None = SPEED, waiting_tokens: float = 0.0) -> ReplicaStats:
    """What a replica says that has so many replicas' worth to do."""
    return ReplicaStats(
        waiting_requests=0,
        running_requests=10 * min(replicas_worth, 1.0),
        waiting_prefill_tokens=waiting_tokens,
        free_blocks=1000,
        total_blocks=1000,
        prefill_tokens_per_s=TOKENS * min(replicas_worth, 1.0 / 0.8),
        decode_tokens_per_s=0.0,
        context_tokens_per_s=0.0,
        speed=speed,
    )


@dataclass
class Pool:
    """A pool whose replicas take ``start_s`` to start, and what became of it."""

    options: PoolOptions
    start_s: float = 60.0
    broken: bool = False
    """Whether replicas never start."""
    target: int = 0
    starting: list[float] = field(default_factory=list)
    history: list[tuple[float, int]] = field(default_factory=list)
    made: int = 0
    names: list[str] = field(default_factory=list)


def run(
    pools: list[Pool],
    load: Callable[[float], float],
    *,
    seconds: float,
    tick_s: float = 1.0,
    check: Callable[[float, Mapping[str, int]], None] = lambda now, targets: None,
) -> Memory:
    """Let the plan decide each second; ``load`` is in replicas' worth. Pools are loaded in proportion to what is up."""
    memory = Memory()
    now = 0.0
    while now < seconds:
        for pool in pools:
            up = [when for when in pool.starting if when <= now]
            pool.starting = [when for when in pool.starting if when > now]
            for _ in up:
                pool.made += 1
                pool.names.append(f"{pool.options.pool}-{pool.made}")
        ready = sum(len(pool.names) for pool in pools)
        each = load(now) / ready if ready else 0.0
        backlog = 5000.0 if each > 1.2 else 0.0
        cheapest = min(pools, key=lambda pool: pool.options.cost)
        states = [
            PoolState(
                pool.options,
                pool.target,
                dict.fromkeys(pool.names, stats(each, waiting_tokens=backlog)),
                requests=10 * load(now) if not ready and pool is cheapest else 0.0,
            )
            for pool in pools
        ]
        targets, memory = plan(states, memory, now=now)
        check(now, targets)
        for pool in pools:
            target = targets[pool.options.pool]
            if target != pool.target:
                pool.history.append((now, target))
                pool.target = target
            while len(pool.names) + len(pool.starting) > target:
                pool.starting.pop() if pool.starting else pool.names.pop()
            while len(pool.names) + len(pool.starting) < target:
                pool.starting.append(float("inf") if pool.broken else now + pool.start_s)
        now += tick_s
    return memory


def options(**given: float | str) -> PoolOptions:
    return PoolOptions(
        **{
            "pool": "one",
            "min_replicas": 0,
            "max_replicas": 10,
            "max_num_seqs": 100,
            "target_utilization": 0.8,
            **given,
        }
    )  # type: ignore[arg-type]  # by name
