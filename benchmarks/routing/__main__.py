"""Routers beside each other in simulated fleets: goodput under a service level, latencies, and the time of a choice.

Every policy gets the same requests on the same engines. Goodput is the share of all requests offered (those turned away
included) whose first token comes within 2 s and whose later ones come within 50 ms on average, times the rate offered.
Engines' speeds are derived from datasheets (``hardware``), not measured; what is compared is the routers.

    python -m benchmarks.routing                      # about ten minutes on one core
    python -m benchmarks.routing --quick
    python -m benchmarks.routing --only bursts --seeds 5
    python -m benchmarks.routing --mooncake conversation_trace.jsonl --speed 2
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import report
from benchmarks.routing.choice_time import measure
from benchmarks.routing.policies import POLICIES
from benchmarks.routing.readers import read_azure, read_mooncake
from benchmarks.routing.scenarios import BLOCK_SIZE, SCENARIOS, Scenario
from benchmarks.routing.simulator import Ingress, Outcome, Simulation
from benchmarks.routing.traces import Request
from deployments.routing import Router, RoutingOptions

TTFT_S = 2.0
TPOT_S = 0.05
OURS = "ours"
ADMITTING_ALL = "ours, admitting all"

Make = Callable[[int], Ingress]


def contestants() -> dict[str, Make]:
    """Every policy by name; each makes an ingress from a seed."""
    made: dict[str, Make] = {policy.name: (lambda seed, policy=policy: policy(seed=seed)) for policy in POLICIES}
    made[ADMITTING_ALL] = lambda seed: Router(RoutingOptions(admission=False), seed=seed)
    made[OURS] = lambda seed: Router(RoutingOptions(admission=True), seed=seed)
    return made


def simulate(scenario: Scenario, make: Make, requests: Sequence[Request], *, seed: int) -> list[Outcome]:
    """One policy on one trace."""
    ingresses = [make(1000 * seed + i) for i in range(scenario.ingresses)]
    simulation = Simulation(ingresses, report_s=scenario.report_s, seed=seed)
    for replica, timing in scenario.fleet():
        simulation.add_replica(replica, timing)
    return simulation.run(requests)


def metrics(outcomes: Sequence[Outcome], *, warm_up_s: float) -> dict[str, float]:
    """Of the requests that came after the warm-up."""
    counted = [one for one in outcomes if one.request.arrival_s >= warm_up_s]
    served = [one for one in counted if one.choice is not None]
    good = sum(one.ttft_s <= TTFT_S and one.tpot_s <= TPOT_S for one in served)
    result = {
        "requests": len(counted),
        "good_share": round(good / len(counted), 4),
        "refused_share": round(1.0 - len(served) / len(counted), 4),
        "hit_rate": round(
            sum(one.cached_tokens for one in served) / max(sum(one.request.prompt_tokens for one in served), 1), 3
        ),
    }
    for name, values in (("ttft_s", [o.ttft_s for o in served]), ("tpot_s", [o.tpot_s for o in served])):
        for percent in (50, 90, 99):
            result[f"{name}_p{percent}"] = round(report.percentile(values, percent), 4) if values else float("nan")
    return result


def compare(by_policy: dict[str, list[dict[str, float]]], who: str) -> dict[str, Any]:
    """Goodput of ``who`` over that of the best of the others (0.01 of the requests at least), seed by seed."""
    others = [name for name in by_policy if name not in (OURS, ADMITTING_ALL)]
    means = {name: sum(one["good_share"] for one in by_policy[name]) for name in others}
    best = max(others, key=lambda name: means[name])
    ratios = [
        mine["good_share"] / max(other["good_share"], 0.01)
        for mine, other in zip(by_policy[who], by_policy[best], strict=True)
    ]
    return {"best_other": best, "ratio": report.spread(ratios)}


def run(scenario: Scenario, seeds: range, progress: Progress, traces: Sequence[Request] | None) -> dict[str, Any]:
    policies = contestants()
    rates = scenario.rates if traces is None else (0.0,)
    task = progress.add_task(scenario.name, total=len(rates) * len(seeds) * len(policies))
    table = []
    for rate in rates:
        by_policy: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
        for seed in seeds:
            requests = traces or scenario.workload.generate(
                rate=rate, seconds=scenario.seconds, block_size=BLOCK_SIZE, seed=seed
            )
            for name, make in policies.items():
                begin = time.process_time()
                outcomes = simulate(scenario, make, requests, seed=seed)
                result = metrics(outcomes, warm_up_s=scenario.warm_up_s)
                result["cpu_s"] = round(time.process_time() - begin, 2)
                by_policy[name].append(result)
                progress.advance(task)
        table.append(
            {
                "rate": rate,
                "policies": by_policy,
                OURS: compare(by_policy, OURS),
                ADMITTING_ALL: compare(by_policy, ADMITTING_ALL),
            }
        )
    workload = asdict(scenario.workload) if traces is None else None
    return {
        "name": scenario.name, "about": scenario.about, "ingresses": scenario.ingresses, "report_s": scenario.report_s,
        "mixed_shared": scenario.mixed_shared, "seconds": scenario.seconds, "seeds": list(seeds),
        "workload": workload,
        "rates": table,
    }  # fmt: skip


def show(console: Console, scenario: dict[str, Any]) -> None:
    table = Table(title=f"{scenario['name']}: {scenario['about']}", caption="share of requests that are good, mean")
    table.add_column("requests/s")
    for row in scenario["rates"]:
        table.add_column(f"{row['rate']:g}", justify="right")
    for name in scenario["rates"][0]["policies"]:
        results = [row["policies"][name] for row in scenario["rates"]]
        table.add_row(name, *(f"{sum(one['good_share'] for one in seeds) / len(seeds):.3f}" for seeds in results))
    for name in (OURS, ADMITTING_ALL):
        ratios = [row[name]["ratio"] for row in scenario["rates"]]
        table.add_row(f"{name} / best other", *(f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in ratios))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute: one seed, two rates, short traces, no 1,000")
    parser.add_argument("--only", default="", help="scenarios whose name this regular expression finds")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="another one than the router was tuned with: not 0, 1"
    )
    parser.add_argument("--azure", type=Path, help="an Azure LLM trace (CSV), on the first chosen fleet")
    parser.add_argument("--mooncake", type=Path, help="a Mooncake trace (JSONL), on the first chosen fleet")
    parser.add_argument("--speed", type=float, default=1.0, help="how many times as fast a file's requests come")
    parser.add_argument("--limit", type=int, help="requests to read of a file")
    options = parser.parse_args()
    context = report.context(["numpy"])
    chosen = [scenario for scenario in SCENARIOS if re.search(options.only, scenario.name)]
    if not chosen:
        parser.error(f"--only {options.only!r} finds none of: {', '.join(one.name for one in SCENARIOS)}")
    traces = None
    if options.azure or options.mooncake:
        read, path = (read_azure, options.azure) if options.azure else (read_mooncake, options.mooncake)
        traces = read(path, block_size=BLOCK_SIZE, limit=options.limit, speed=options.speed)
        chosen = [replace(chosen[0], name=path.name, max_model_len=131072, mixed_shared=False)]
    if options.quick:
        chosen = [
            replace(one, rates=one.rates[1:3], seconds=40.0, warm_up_s=15.0) for one in chosen if len(one.rates) > 1
            and len(one.fleet()) < 100
        ]  # fmt: skip
    console = Console()
    scenarios = []
    with Progress(console=console) as progress:
        for scenario in chosen:
            count = 1 if options.quick or len(scenario.fleet()) > 100 else options.seeds
            seeds = range(options.first_seed, options.first_seed + count)
            scenarios.append(run(scenario, seeds, progress, traces))
            show(progress.console, scenarios[-1])
    times = measure(200 if options.quick else 1000)
    console.print("microseconds of a choice among 1,000 replicas:", times)
    path = report.write(
        "routing", {**context, "slo": {"ttft_s": TTFT_S, "tpot_s": TPOT_S}, "scenarios": scenarios, "choice_us": times}
    )
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
