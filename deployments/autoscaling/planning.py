"""How many replicas each pool should have: ``plan(pools, memory, now=...) -> (targets, memory)``, a pure function.

The load of all pools together, with its trend, is given to the pools in the order of their cost, each up to its bound.
That is computed twice: for what the load needs, and with a margin. A pool grows to the least that was needed over
``upscale_delay_s`` and shrinks to the most that was needed with a margin over ``downscale_delay_s``, so a load that
goes up and down makes for the replicas of its peaks, and nothing comes or goes with the noise. For growing, what was
asked for counts as there, unless it is long overdue; for shrinking, only what is up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from deployments.autoscaling.model import growth, mean_speed, needed, pool_overloaded, work
from deployments.autoscaling.state import Load, Memory, PoolMemory, PoolState, Wish

MARGIN = 0.8
"""After a replica has gone, the load takes at most this share of what is allowed."""
OVERLOAD_GROWTH = 2.0
"""What has been served says little about what is asked for when requests wait or are turned away, so then this many
times what is up is asked for, and again when that is up."""
OVERDUE = 3.0
OVERDUE_S = 60.0
"""A replica that has taken this many times as long as others, and so much more, is no longer counted on."""
BOUND_DELAYS = 4.0
"""Downscale delays for which a load is taken to be bound to its pool."""
START_WEIGHT = 0.5
"""Of a new observation of the time that a replica takes to start."""
TOLERANCE = 0.05
"""Of a replica, that the load may exceed what there is before another one is asked for."""
LEAST = 0.1
"""Of a replica, that the smallest load counts as."""
QUANTUM = 1 / 300
"""Of the longest delay: wishes of so short a time become one."""
TREND_S = 120.0
"""A trend is looked for in so much of the past, or the time that replicas take to start if that is longer."""
TREND_SAMPLES = 40


def plan(pools: Sequence[PoolState], memory: Memory, *, now: float) -> tuple[dict[str, int], Memory]:
    """Decide how many replicas each pool should have.

    Args:
        pools: all that may serve the same requests; of equal cost, earlier ones are preferred.
        memory: as returned by the call before; ``Memory()`` at first.
        now: seconds of a clock that goes on, the same for all calls.

    Returns:
        The replicas that each pool should have, by name, within its bounds, and what to remember.
    """
    pools = sorted(pools, key=lambda pool: pool.options.cost)
    learned = {p.options.pool: _learn(p, memory.pools.get(p.options.pool, PoolMemory()), now) for p in pools}
    load = sum((_load(pool) for pool in pools), Load()).demand
    loads = _remember_load(memory.loads, load, now, span_s=max(TREND_S, *map(_start_s, pools, learned.values()), 0.0))
    allocation = _Allocation(pools, learned, load, trend=_trend(pools, learned, loads), now=now)
    targets: dict[str, int] = {}
    for pool in pools:
        name = pool.options.pool
        up, down = allocation.up[name], allocation.down[name]
        wishes = _remember_wish(learned[name].wishes, up, down, pool=pool, now=now)
        bound = now + BOUND_DELAYS * pool.options.downscale_delay_s if name in allocation.bound else None
        learned[name] = replace(learned[name], wishes=wishes, bound_until=bound or learned[name].bound_until)
        targets[name] = _decide(pool, wishes, now)
    return targets, Memory(learned, loads)


class _Allocation:
    """The replicas of each pool that the load as it is now calls for."""

    def __init__(
        self, pools: Sequence[PoolState], learned: Mapping[str, PoolMemory], load: Load, *, trend: float, now: float
    ) -> None:
        self._pools = pools
        self._learned = learned
        self._load = load
        self._whole = self._replicas_for_all()
        over = {p.options.pool for p in pools if pool_overloaded(p, learned[p.options.pool])}
        up_now = {p.options.pool for p in pools if p.ready}
        everywhere = bool(over) and over == up_now
        self.bound = set() if everywhere else over
        """Pools that are overloaded while others are not."""
        share = trend
        if everywhere:
            present = sum(p.ready / self._whole[p.options.pool] for p in pools if self._whole[p.options.pool] > 0)
            # Who was turned away is counted already, and would be counted twice.
            share = max(share, OVERLOAD_GROWTH * (present if load.refused_tokens else max(present, 1.0)))
        self.up = self._give(share, lambda pool: self._counted_on(pool, now))
        self.down = self._give(trend / MARGIN, lambda pool: pool.ready)
        for pool in pools:
            name, bounds = pool.options.pool, pool.options
            if name in over or None in pool.replicas.values():  # whatever the rates say, or what is not known yet
                self.down[name] = max(self.down[name], pool.ready)
            if name in self.bound:
                self.up[name] = max(self.up[name], math.ceil(OVERLOAD_GROWTH * pool.ready))
            elif learned[name].bound_until > now:
                own = needed(_load(pool).demand, bounds, learned[name]) or 0.0
                self.down[name] = max(self.down[name], math.ceil(own / MARGIN))
            if pool.held > 0:
                self.up[name] = max(self.up[name], math.ceil(pool.requests / bounds.max_num_seqs))
            if pool.requests > 0:  # engines may not have heard of them yet
                self.down[name] = max(self.down[name], 1)
            self.up[name] = _within(pool, self.up[name])
            self.down[name] = _within(pool, max(self.down[name], self.up[name]))

    def _replicas_for_all(self) -> dict[str, float]:
        """By pool, its replicas that would serve the whole load. Of unknown speed, they are worth what they cost."""
        found = {p.options.pool: needed(self._load, p.options, self._learned[p.options.pool]) for p in self._pools}
        known = [(p.options.cost, n) for p in self._pools if (n := found[p.options.pool]) is not None]
        whole = {}
        for pool in self._pools:
            name, cost = pool.options.pool, pool.options.cost
            number = found[name]
            if number is None and known:
                number = sum(n * c / cost for c, n in known) / len(known)
            elif number is None:
                number = self._load.requests / pool.options.max_num_seqs
            whole[name] = number if self._load.is_nothing else max(number, LEAST)
        return whole

    def _give(self, share: float, available: Callable[[PoolState], int]) -> dict[str, int]:
        """Share out so many times the load; pools count with what is ``available`` of them."""
        given = {}
        for pool in self._pools:
            whole = self._whole[pool.options.pool]
            given[pool.options.pool] = count = _within(pool, math.ceil(max(share, 0.0) * whole - TOLERANCE))
            if whole > 0:
                share -= min(count, available(pool)) / whole
        return given

    def _counted_on(self, pool: PoolState, now: float) -> int:
        memory = self._learned[pool.options.pool]
        start_s = _start_s(pool, memory)
        if memory.asked and now - memory.asked[0] > max(OVERDUE * start_s, start_s + OVERDUE_S):
            return pool.ready
        return pool.options.max_replicas


def _within(pool: PoolState, count: int) -> int:
    return max(pool.options.min_replicas, min(count, pool.options.max_replicas))


def _start_s(pool: PoolState, memory: PoolMemory) -> float:
    return pool.options.start_s if memory.start_s is None else memory.start_s


def _load(pool: PoolState) -> Load:
    return sum((s.load(pool.options.block_size) for s in pool.replicas.values() if s is not None), Load())


def _learn(pool: PoolState, memory: PoolMemory, now: float) -> PoolMemory:
    """Note what the replicas say of themselves, and how long those that have come took."""
    stats = [s for s in pool.replicas.values() if s is not None]
    known = frozenset(pool.replicas)
    asked = list(memory.asked)
    start_s = memory.start_s
    for _ in range(min(len(known - memory.known), len(asked))):
        took = now - asked.pop(0)
        start_s = took if start_s is None else start_s + START_WEIGHT * (took - start_s)
    missing = max(pool.target - len(known), 0)
    del asked[missing:]
    asked += [now] * (missing - len(asked))
    kv_tokens = max((s.total_blocks for s in stats), default=0.0) * pool.options.block_size
    return replace(
        memory,
        speed=mean_speed(stats) or memory.speed,
        kv_tokens=kv_tokens or memory.kv_tokens,
        start_s=start_s,
        asked=tuple(asked),
        known=known,
    )


def _remember_load(
    loads: tuple[tuple[float, Load], ...], load: Load, now: float, *, span_s: float
) -> tuple[tuple[float, Load], ...]:
    if loads and now - loads[-1][0] < span_s / TREND_SAMPLES:
        return loads
    return (*(entry for entry in loads if now - entry[0] <= span_s), (now, load))


def _trend(
    pools: Sequence[PoolState], learned: Mapping[str, PoolMemory], loads: tuple[tuple[float, Load], ...]
) -> float:
    """How many times the present load there will be when a replica asked for now is up."""
    for pool in pools:
        memory = learned[pool.options.pool]
        if memory.speed is not None:
            speed = memory.speed
            ahead_s = _start_s(pool, memory) + pool.options.upscale_delay_s
            return growth([(when, work(load, speed)) for when, load in loads], ahead_s)
    return 1.0


def _remember_wish(wishes: tuple[Wish, ...], up: int, down: int, *, pool: PoolState, now: float) -> tuple[Wish, ...]:
    """Add a wish. Equal ones in a row become one, and so do those of a short time, to the side of changing nothing."""
    delays = (pool.options.downscale_delay_s, pool.options.to_zero_delay_s, pool.options.upscale_delay_s)
    kept = [wish for wish in wishes if now - wish.until <= max(delays)]
    if not kept:
        return (Wish(now, now, up, down),)
    last = kept[-1] = replace(kept[-1], until=now)
    if (last.up, last.down) != (up, down):
        if now - last.since < max(delays) * QUANTUM:
            kept[-1] = replace(last, up=min(last.up, up), down=max(last.down, down))
        else:
            kept.append(Wish(now, now, up, down))
    return tuple(kept)


def _decide(pool: PoolState, wishes: tuple[Wish, ...], now: float) -> int:
    """From what was wished for of late; less than long enough changes nothing."""
    options = pool.options
    target = _within(pool, pool.target)
    if pool.held > 0:
        return max(target, wishes[-1].up)

    def recent(delay_s: float) -> list[Wish]:
        return [wish for wish in wishes if wish.until > now - delay_s or wish is wishes[-1]]

    seen_s = now - wishes[0].since
    if seen_s >= options.upscale_delay_s:
        least = min(wish.up for wish in recent(options.upscale_delay_s))
        if least > target:
            return least
    delay_s = options.to_zero_delay_s if target == 1 else options.downscale_delay_s
    if seen_s >= delay_s:
        most = max(wish.down for wish in recent(delay_s))
        return min(target, most if target == 1 else max(most, 1))
    return target
