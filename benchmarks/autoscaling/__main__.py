"""Autoscaling policies beside each other on the same loads: what they cost, and how many requests were served well.

Engines, router and traces are those of ``benchmarks.routing``: speeds are derived from datasheets, not measured. A
request counts as good if its first token comes within 2 s and its later ones within 50 ms on average; those turned away
do not, and do not come again. Accelerator hours are those of replicas starting, up and draining, times the pool's cost.

    python -m benchmarks.autoscaling                        # all loads, on the seeds that nothing was tuned on
    python -m benchmarks.autoscaling --quick --seeds 101    # the first tenth of each load, once
    python -m benchmarks.autoscaling --only day --write benchmarks/results/autoscaling.json

``--write`` keeps what the file has of other loads, so that a long run may be made in parts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.autoscaling.fleet import Cluster, Policy
from benchmarks.autoscaling.policies import Fixed, Planned, RequestCount
from benchmarks.autoscaling.scenarios import SCENARIOS, Scenario
from benchmarks.routing.traces import Request
from deployments.routing import Router, RoutingOptions

TTFT_S = 2.0
TPOT_S = 0.05
SEEDS = (101, 102, 103, 104, 105)
"""The plan, and the tuned request count, were looked at with 11, 12 and 13 only."""
STOCK = "count 2, 30/600 s"
TUNED = "count 2, 10/300 s"

POLICIES: dict[str, Callable[[], Policy]] = {
    "plan": Planned,
    STOCK: lambda: RequestCount(2, upscale_delay_s=30.0, downscale_delay_s=600.0),
    TUNED: lambda: RequestCount(2, upscale_delay_s=10.0, downscale_delay_s=300.0),
    "count 4, 10/300 s": lambda: RequestCount(4, upscale_delay_s=10.0, downscale_delay_s=300.0),
    "all, always": Fixed,
}
"""``STOCK`` is what Serve does unless told otherwise. The others have the plan's delays; 2 is the target at which they
took about as many hours as the plan did, on the seeds that it was tuned on."""


def simulate(
    scenario: Scenario, make: Callable[[], Policy], requests: list[Request], *, seed: int, admission: bool = True
) -> dict[str, Any]:
    """One policy on one trace."""
    started = time.perf_counter()
    router = Router(RoutingOptions(admission=admission), seed=seed)
    cluster = Cluster(router, scenario.pools, make(), seed=seed)
    if scenario.kill_every_s is not None:
        cluster.every(scenario.kill_every_s, lambda _: cluster.kill())
    outcomes = cluster.run(requests)
    good = sum(o.e2e_s == o.e2e_s and o.ttft_s <= TTFT_S and o.tpot_s <= TPOT_S for o in outcomes)
    served = [o for o in outcomes if o.e2e_s == o.e2e_s]
    ttfts = [o.ttft_s for o in served] or [0.0]
    pools = cluster.pools.values()
    return {
        "requests": len(outcomes),
        "good_share": round(good / max(len(outcomes), 1), 4),
        "turned_away": sum(o.choice is None for o in outcomes),
        "unanswered": sum(o.choice is not None and o.e2e_s != o.e2e_s for o in outcomes),
        "accelerator_hours": round(sum(p.replica_s * p.plan.options.cost for p in pools) / 3600, 2),
        "ttft_p50_s": round(report.percentile(ttfts, 50), 3),
        "ttft_p99_s": round(report.percentile(ttfts, 99), 3),
        "tpot_p99_s": round(report.percentile([o.tpot_s for o in served] or [0.0], 99), 4),
        "targets": {p.plan.options.pool: [(round(when), target) for when, target in p.changes] for p in pools},
        "most": {p.plan.options.pool: max([p.plan.initial, *(t for _, t in p.changes)]) for p in pools},
        "seconds_to_simulate": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Autoscaling policies beside each other, simulated.")
    parser.add_argument("--only", action="append", help="a scenario; may be repeated")
    parser.add_argument("--policy", action="append", help="a policy; may be repeated")
    parser.add_argument("--quick", action="store_true", help="the first tenth of each load")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", type=Path, help="add the result to this file; a new one under results/ otherwise")
    arguments = parser.parse_args()
    console = Console()
    name = "autoscaling-quick" if arguments.quick else "autoscaling"
    context = {**report.context(["numpy"]), "seeds": arguments.seeds}
    scenarios: dict[str, Any] = {}
    before: dict[str, Any] = {}
    if arguments.write is not None and arguments.write.exists():
        before = json.loads(arguments.write.read_text(encoding="utf-8"))["scenarios"]
    result: dict[str, Any] = {"ttft_s": TTFT_S, "tpot_s": TPOT_S}
    policies = arguments.policy or list(POLICIES)
    with ProcessPoolExecutor(arguments.jobs) as processes:
        for scenario in SCENARIOS:
            if arguments.only and scenario.name not in arguments.only:
                continue
            share = 0.1 if arguments.quick else 1.0
            rows = {
                policy: [processes.submit(run, scenario.name, policy, seed=s, share=share) for s in arguments.seeds]
                for policy in policies
            }
            done = {policy: [future.result() for future in futures] for policy, futures in rows.items()}
            console.print(table(scenario, done))
            scenarios[scenario.name] = {
                "about": scenario.about,
                "context": context,
                "policies": {policy: {**summary(runs), "runs": runs} for policy, runs in done.items()},
            }
            result["scenarios"] = {**before, **scenarios}
            if arguments.write is not None:  # at once, so that what is done is kept
                arguments.write.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.write is None:
        console.print(report.write(name, result))


def run(scenario_name: str, policy: str, *, seed: int, share: float) -> dict[str, Any]:
    """One of POLICIES on one of SCENARIOS; names, as it may run in another process."""
    (scenario,) = [scenario for scenario in SCENARIOS if scenario.name == scenario_name]
    requests = scenario.requests(seed=seed, share=share)
    return {"seed": seed, **simulate(scenario, POLICIES[policy], requests, seed=seed)}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Least, middle and greatest over the seeds."""
    return {name: report.spread([run[name] for run in runs]) for name in ("good_share", "accelerator_hours")}


def table(scenario: Scenario, done: dict[str, list[dict[str, Any]]]) -> Table:
    """One row a policy: medians, and in parentheses least and most over the seeds."""
    made = Table("policy", "good", "accelerator h", "turned away", "TTFT p99", "changes", "s", title=scenario.name)
    for policy, runs in done.items():
        spread = summary(runs)
        good, hours = spread["good_share"], spread["accelerator_hours"]
        made.add_row(
            policy,
            f"{good['median']:.1%} ({good['min']:.1%} to {good['max']:.1%})",
            f"{hours['median']:.1f} ({hours['min']:.1f} to {hours['max']:.1f})",
            f"{sum(run['turned_away'] for run in runs) / sum(run['requests'] for run in runs):.1%}",
            f"{max(run['ttft_p99_s'] for run in runs):.1f} s",
            f"{sum(len(changes) for run in runs for changes in run['targets'].values()) / len(runs):.0f}",
            f"{sum(run['seconds_to_simulate'] for run in runs):.0f}",
        )
    return made


if __name__ == "__main__":
    main()
