"""How many replicas a load needs, and what requests meet with now.

Of a second, the ``n`` replicas of a pool spend ``work / n`` on what requests add to their steps:

    work = prefill tokens * prefill + decode tokens * decode + context tokens * context

(rates a second, speeds as learned). What is left goes into steps of ``step`` seconds each, so there are
``(1 - work / n) / step`` of them, and the time between two tokens of a request is ``step / (1 - work / n)``. A bound on
that is a bound on ``work / n``.
"""

from __future__ import annotations

import math

from deployments.autoscaling.state import Load, PoolMemory, PoolOptions, PoolState, ReplicaStats, Speed

IDLE_STRETCH = 1.5
"""Where even an idle replica misses the time per token asked for, it may take so many times the idle replica's."""
MOST_KV = 0.9
"""Of the KV cache, so that prefixes find room and nothing is preempted."""
MOST_SEATS = 0.9
FULL_KV = 0.97
"""KV use with which a replica that lets requests wait counts as full."""
QUEUE_SHARE = 0.5
"""Of the time to first token asked for, what a new request may have to wait for the prompts before it."""

LEAST_SAMPLES = 20
"""Half of those that are kept: the first minutes of anything look like growth."""
SURE = 4.0
"""Samples are means over overlapping times, so the standard error of independent ones is too small."""
MOST_GROWTH = 1.5


def work(load: Load, speed: Speed) -> float:
    """Seconds of replicas a second that a load adds to their steps."""
    return load.prefill_tokens * speed.prefill + load.decode_tokens * speed.decode + load.context_tokens * speed.context


def most_work(options: PoolOptions, speed: Speed) -> float:
    """Share of a replica's time that work may take, by the service level and the utilization allowed."""
    tpot = max(options.slo_tpot_s, IDLE_STRETCH * speed.step)
    return min(options.target_utilization, 1.0 - speed.step / tpot)


def needed(load: Load, options: PoolOptions, memory: PoolMemory) -> float | None:
    """Replicas of a pool that would serve a whole load, in fractions; None if the pool's speed is unknown."""
    if memory.speed is None:
        return None
    by_time = work(load, memory.speed) / most_work(options, memory.speed)
    by_seats = load.requests / (options.max_num_seqs * MOST_SEATS)
    by_memory = load.kv_tokens / (memory.kv_tokens * MOST_KV) if memory.kv_tokens else 0.0
    return max(by_time, by_seats, by_memory)


def overloaded(stats: ReplicaStats, speed: Speed, options: PoolOptions) -> bool:
    """Whether new requests can be expected to miss the service level on a replica."""
    load = stats.load(options.block_size)
    share = min(work(load, speed), 0.95)
    decode_share = min(share, load.decode_tokens * speed.decode + load.context_tokens * speed.context)
    queue_s = stats.waiting_prefill_tokens * speed.prefill / (1.0 - decode_share)
    tpot_s = speed.step / (1.0 - share)
    kv_use = 1.0 - stats.free_blocks / stats.total_blocks if stats.total_blocks else 0.0
    return (
        queue_s > options.slo_ttft_s * QUEUE_SHARE
        or tpot_s > max(options.slo_tpot_s, IDLE_STRETCH * speed.step)
        or (kv_use > FULL_KV and stats.waiting_requests > 0)
        or stats.running_requests + stats.waiting_requests > options.max_num_seqs
    )


def pool_overloaded(pool: PoolState, memory: PoolMemory) -> bool:
    """Whether more than half of the replicas say so; one that has just come has said nothing, and may be enough."""
    if memory.speed is None:
        return False
    answers = [overloaded(s, s.speed or memory.speed, pool.options) for s in pool.replicas.values() if s is not None]
    return 2 * sum(answers) > len(pool.replicas)


def mean_speed(replicas: list[ReplicaStats]) -> Speed | None:
    """The mean of those that know theirs, by how long they have had to learn: the first seconds tell little."""
    speeds = [stats.speed for stats in replicas if stats.speed is not None]
    if not speeds:
        return None
    seen_s = sum(s.seen_s for s in speeds)
    return Speed(
        sum(s.step * s.seen_s for s in speeds) / seen_s,
        sum(s.prefill * s.seen_s for s in speeds) / seen_s,
        sum(s.decode * s.seen_s for s in speeds) / seen_s,
        sum(s.context * s.seen_s for s in speeds) / seen_s,
        seen_s,
    )


def growth(samples: list[tuple[float, float]], ahead_s: float) -> float:
    """How many times its present value a series reaches in so many seconds, if it goes on as it does.

    From 1 to ``MOST_GROWTH``. A straight line by least squares; one whose slope is less than ``SURE`` standard errors
    from 0 is taken as level, so that noise is no trend.
    """
    count = len(samples)
    if count < LEAST_SAMPLES:
        return 1.0
    mean_t = sum(t for t, _ in samples) / count
    mean_y = sum(y for _, y in samples) / count
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    if spread <= 0.0:
        return 1.0
    slope = sum((t - mean_t) * (y - mean_y) for t, y in samples) / spread
    left = sum((y - mean_y - slope * (t - mean_t)) ** 2 for t, y in samples)
    error = math.sqrt(left / (count - 2) / spread)
    now = mean_y + slope * (samples[-1][0] - mean_t)
    if slope <= SURE * error or now <= 0.0:
        return 1.0
    return min(1.0 + slope * ahead_s / now, MOST_GROWTH)
