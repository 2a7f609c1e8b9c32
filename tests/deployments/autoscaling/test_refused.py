"""What is turned away reaches the numbers that Serve's controller reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from probe import greedy
from ray import serve
from ray.exceptions import RayError

from deployments.directory import EngineAddress
from deployments.refusals import Refusals
from deployments.routing import Replica

REFUSING = {"admission": True, "max_cost": 1e-9, "max_tpot_s": 1000.0}
"""An idle engine takes a request, another one never."""
PROMPT = [7] * 50


def address(name: str) -> EngineAddress:
    spec = Replica(name, "pool", 512, 16, 100, 8, 512)
    return EngineAddress(
        spec=spec, model_path="", identity="", actor_name=name, namespace="", stalled_after_s=60, start_seconds=1
    )


def test_refusals_of_a_moment_are_one_report_and_engines_take_turns() -> None:
    async def run() -> list[tuple[str, int]]:
        reports: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

        async def send(engine: EngineAddress, tokens: int) -> None:
            reports.put_nowait((engine.replica_id, tokens))

        refusals = Refusals(lambda: [address("a"), address("b")], send, interval_s=0.001)
        told = []
        for _ in range(3):
            refusals.add(10)
            refusals.add(5)
            told.append(await reports.get())
        refusals.close()
        return told

    assert asyncio.run(run()) == [("a", 15), ("b", 15), ("a", 15)]


def test_the_replica_counts_what_the_ingress_turned_away(application: Callable[..., Any]) -> None:
    with application("refusing", args={"routing": REFUSING}) as probe:
        replica = serve.get_deployment_handle("EngineReplica-refusing", app_name="refusing")
        probe.until_engines.remote(1).result(timeout_s=240)
        stats = {"refused_tokens_per_s": 0.0}
        refused = 0
        deadline = time.monotonic() + 60
        while stats["refused_tokens_per_s"] == 0.0 and time.monotonic() < deadline:
            # As long as the engine's speed is a guess, nothing is turned away; so try until that is over.
            answers = [probe.generate.remote(greedy(f"{time.monotonic()}-{i}", PROMPT, 100)) for i in range(3)]
            for answer in answers:
                with suppress(RayError):
                    answer.result(timeout_s=120)
                    continue
                refused += 1
            stats = replica.record_autoscaling_stats.remote().result(timeout_s=60)
        assert refused > 0
        assert stats["refused_tokens_per_s"] > 0
        assert stats["begun_tokens_per_s"] >= 0
