"""Kills under load: processes are lost at random while clients stream, and no client may notice.

A fake cluster has two pools, H20 and A100, with two engines each, behind a few ingress processes. Clients ask for known
answers, streamed and whole; meanwhile shards, replicas and, if wanted, ingresses are killed with -9, and a node is
taken away. Every answer must be what it was before the first kill, to the token, and afterwards nothing may be left
over. Only the requests that a killed ingress was at may be lost; they are counted apart. The result is a file in
``benchmarks/results``.

    python -m benchmarks.chaos --kills 30 --ingress-kills 10 --seconds 360
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.chaos.application import APP, ENGINES, KINDS, PROCESSES, application_args, running_engines
from benchmarks.chaos.kills import POLL_S, RECOVERY_S, Chaos
from benchmarks.chaos.verdict import leftovers, split_failures
from benchmarks.fake_cluster import FakeCluster
from benchmarks.steady_load import Load, questions

LEASES_END_S = 10.0
"""After the last request, until whatever is held is a leftover: a lease lasts up to a second longer."""


def run_chaos(
    *,
    kills: int,
    seconds: float,
    ingress_kills: int = 0,
    clients: int = 6,
    seed: int = 0,
    remove_node: bool = True,
) -> dict[str, Any]:
    """All of it; the result as the JSON file has it."""
    with tempfile.TemporaryDirectory(prefix="dibit-chaos-") as folder:
        access_log = Path(folder) / "access.log"
        with FakeCluster(KINDS, http=True) as cluster:
            load, chaos, found = _disturb(
                cluster,
                access_log,
                clients=clients,
                seed=seed,
                kills=kills,
                ingress_kills=ingress_kills,
                seconds=seconds,
                remove_node=remove_node,
            )
        lines = [json.loads(line) for line in access_log.read_text(encoding="utf-8").splitlines()]
    closed, failed = split_failures(
        load.failures,
        ingress_deaths=chaos.ingress_deaths,
        ended_by_an_ingress={line["request_id"] for line in lines},
    )
    recovered = chaos.recovery.seconds
    return {
        "kills": chaos.counts,
        "seconds": seconds,
        "clients": clients,
        "served": load.served,
        "failed_or_altered": len(failed),
        "failures": [failure.what for failure in failed][:20],
        "closed_with_their_ingress": len(closed),
        "closed": [failure.what for failure in closed][:20],
        "slowest_request_s": round(load.slowest_s, 2),
        "full_capacity_after_s": {
            "measured": len(recovered),
            "p50": round(statistics.median(recovered), 2) if recovered else None,
            "max": round(max(recovered), 2) if recovered else None,
        },
        "recovered": chaos.recovery.complete,
        "leftovers": found,
    }


def _disturb(
    cluster: FakeCluster, access_log: Path, *, clients: int, seed: int, **what: Any
) -> tuple[Load, Chaos, list[str]]:
    """The load, the kills under it, and what was left of them."""
    from ray import serve

    from deployments.app import build

    serve.run(build(application_args(access_log)), name=APP)
    deadline = time.monotonic() + RECOVERY_S
    while running_engines() < ENGINES and time.monotonic() < deadline:
        time.sleep(POLL_S)
    load = Load(cluster.url, questions(APP, 24, tokens=120), clients)
    load.learn()
    load.start()
    chaos = Chaos(cluster, seed=seed)
    try:
        chaos.cause(**what)
    finally:
        load.stop()
    deadline = time.monotonic() + LEASES_END_S
    while (found := leftovers(cluster)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    serve.delete(APP)
    deadline = time.monotonic() + 30
    while (left := cluster.processes(*PROCESSES.values())) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return load, chaos, found + [f"after the end: {title}" for title in left.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of shards and replicas, one of them with its node")
    parser.add_argument("--ingress-kills", type=int, default=0, help="of ingresses, besides")
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file; benchmarks/results/chaos-<date>.json by default")
    options = parser.parse_args()
    context = report.context(["ray", "torch"])
    result = run_chaos(
        kills=options.kills,
        ingress_kills=options.ingress_kills,
        seconds=options.seconds,
        clients=options.clients,
        seed=options.seed,
    )
    result = {**context, **result}
    if options.out is None:
        print(report.write("chaos", result))
    else:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
