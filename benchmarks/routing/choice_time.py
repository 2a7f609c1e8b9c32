"""How long one choice among 1,000 replicas takes, prefix match and reservation included."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from benchmarks.report import percentile
from benchmarks.routing.traces import name_block
from deployments.routing import Job, Replica, Router, RoutingOptions
from engine.messages import EngineLoad

REPLICAS = 1000
BLOCK_SIZE = 16
SYSTEM_BLOCKS = 64
SESSION_BLOCKS = 2048
"""A session of 32,768 tokens lies on each replica."""


def measure(choices: int) -> dict[str, dict[str, float]]:
    """Microseconds, by kind of prompt, and of one observation of a step."""
    rng = random.Random(0)
    router = Router(RoutingOptions(admission=True), seed=0)
    systems = [[name_block(1 << 40 | group, i) for i in range(SYSTEM_BLOCKS)] for group in range(16)]
    sessions = []
    for i in range(REPLICAS):
        replica_id = f"replica-{i}"
        router.add(Replica(replica_id, "a" if i % 3 else "b", 131072, BLOCK_SIZE, 20000, 256, 2048))
        session = systems[i % 16] + [name_block(i + 1, k) for k in range(SYSTEM_BLOCKS, SESSION_BLOCKS)]
        sessions.append(session)
        here = [name for system in systems for name in system[: rng.choice((0, 20, 64, 64))]]
        router.observe(replica_id, _load(100, rng.randrange(40)), cached=here + session, now=0.0)
    fresh = iter(range(10**6, 10**9))
    prompts: dict[str, Callable[[int], list[bytes]]] = {
        "2,048 tokens, nothing cached": lambda i: [name_block(next(fresh), k) for k in range(128)],
        "1,024 of 2,048 tokens cached on most": lambda i: (
            systems[i % 16] + [name_block(next(fresh), k) for k in range(64, 128)]
        ),
        "session of 2,048 tokens": lambda i: sessions[i % REPLICAS][:128],
        "session of 8,192 tokens": lambda i: sessions[i % REPLICAS][:512],
        "session of 32,768 tokens": lambda i: sessions[i % REPLICAS],
    }
    result = {}
    for name, prompt in prompts.items():
        times = []
        for i in range(choices):
            hashes = prompt(i)
            job = Job(len(hashes) * BLOCK_SIZE + 5, 512, {BLOCK_SIZE: hashes})
            begin = time.perf_counter()
            choice = router.choose(job, now=1.0)
            times.append(time.perf_counter() - begin)
            router.finished(choice, tokens=10, now=2.0)
        result[name] = _spread(times)
    times = []
    for i in range(choices):
        load = _load(101 + i // REPLICAS, 10)
        begin = time.perf_counter()
        router.observe(f"replica-{i % REPLICAS}", load, now=3.0 + i)
        times.append(time.perf_counter() - begin)
    result["one observation"] = _spread(times)
    return result


def _load(steps: int, running: int) -> EngineLoad:
    return EngineLoad(
        waiting_requests=0,
        running_requests=running,
        waiting_prefill_tokens=0,
        free_blocks=15000,
        total_blocks=20000,
        steps=steps,
        step_seconds=0.03,
        busy_seconds=0.03 * steps,
        prefill_tokens=100 * steps,
        decode_tokens=30 * steps,
        context_tokens=45000 * steps,
    )


def _spread(times: list[float]) -> dict[str, float]:
    return {f"p{percent}": round(percentile(times, percent) * 1e6, 1) for percent in (10, 50, 99)}
