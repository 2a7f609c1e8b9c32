"""Autoscaling policies beside each other on the same loads: what they cost, and how many requests were served well.

Engines, router and traces are those of ``benchmarks.routing``: speeds are derived from datasheets, not measured. A
request counts as good if its first token comes within 2 s and its later ones within 50 ms on average; those turned away
do not. Accelerator hours are those of replicas starting, up and draining, times the pool's cost.

    python -m benchmarks.autoscaling                   # about half an hour on two busy cores
    python -m benchmarks.autoscaling --quick           # the first tenth of each load
    python -m benchmarks.autoscaling --only day
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
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
OUR_DELAYS = {"upscale_delay_s": 10.0, "downscale_delay_s": 300.0}
"""For all alike. Serve's defaults are 30 and 600 s."""

POLICIES: dict[str, Callable[[], Policy]] = {
    "plan": Planned,
    "count 64": lambda: RequestCount(64, **OUR_DELAYS),
    "count 16": lambda: RequestCount(16, **OUR_DELAYS),
    "count 4": lambda: RequestCount(4, **OUR_DELAYS),
    "fixed at most": Fixed,
}


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
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = {"context": report.context(["numpy"]), "ttft_s": TTFT_S, "tpot_s": TPOT_S, "scenarios": {}}
    for scenario in SCENARIOS:
        if arguments.only and scenario.name not in arguments.only:
            continue
        requests = scenario.requests(seed=arguments.seed, share=0.1 if arguments.quick else 1.0)
        rows = {}
        table = Table(
            "policy", "good", "accelerator h", "turned away", "TTFT p99", "changes", "most", "s", title=scenario.name
        )
        for name, make in POLICIES.items():
            if arguments.policy and name not in arguments.policy:
                continue
            rows[name] = row = simulate(scenario, make, requests, seed=arguments.seed)
            changes = sum(map(len, row["targets"].values()))
            table.add_row(
                name, f"{row['good_share']:.1%}", f"{row['accelerator_hours']:.1f}", f"{row['turned_away']}",
                f"{row['ttft_p99_s']:.1f} s", f"{changes}", f"{row['most']}", f"{row['seconds_to_simulate']:.0f}",
            )  # fmt: skip
        console.print(table)
        result["scenarios"][scenario.name] = {"about": scenario.about, "policies": rows}
    console.print(report.write("autoscaling-quick" if arguments.quick else "autoscaling", result))


if __name__ == "__main__":
    main()
