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
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.fake_cluster import FRONT, FakeCluster, NodeKind
from benchmarks.steady_load import Failure, Load, questions

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "ernie-tiny" / "bf16"
APP = "chaos"
ENGINES, INGRESSES = 4, 3
KINDS = (NodeKind("H20", 2), NodeKind("A100", 2))
LEASES_END_S = 10.0
"""After the last request, until whatever is held is a leftover: a connection's lease lasts half a second longer."""
POLL_S = 0.5
RECOVERY_S = 300.0
CLOSED_WITHIN_S = 10.0
"""Time in which the clients of an ingress hear of its death; what ends later has another cause."""
PROCESSES = {
    "shard": "ray::Shard",
    "replica": f"ray::ServeReplica:{APP}:EngineReplica",
    "ingress": f"ray::ServeReplica:{APP}:Ingress",
}
EXPECTED = {"shard": ENGINES, "replica": ENGINES, "ingress": INGRESSES}


def application_args(access_log: Path) -> dict[str, Any]:
    """The ``args`` of the application under test: what it is asked must be answered, however slow the machine."""
    pools = [
        {
            "name": kind.accelerator_type.lower(),
            "accelerator_type": kind.accelerator_type,
            "replicas": 2,
            "num_cpus": 0.5,
        }
        for kind in KINDS
    ]
    return {
        "model": str(MODEL),
        "served_model_name": APP,
        "engine": {"device": "cpu", "max_model_len": 512, "max_num_seqs": 16, "num_kv_blocks": 256, "num_threads": 1},
        "pools": pools,
        # On the head, which is not taken away.
        "ingress": {"replicas": INGRESSES, "resources": {FRONT: 0.01}},
        "health": {"check_period_s": 1.0, "drain_timeout_s": 10.0},
        "routing": {"admission": False},
        "access": {"log": str(access_log)},
    }


def split_failures(
    failures: Iterable[Failure], *, ingress_deaths: Sequence[float], ended_by_an_ingress: Collection[str]
) -> tuple[list[Failure], list[Failure]]:
    """Requests that went with their ingress, and those that failed otherwise.

    An ingress writes a line about each request that ends there, however it does. So a request that was under way when
    an ingress was killed, ended right then, and of which no line tells, was with the one killed.
    """
    closed, failed = [], []
    for failure in failures:
        in_time = any(failure.began <= at <= failure.ended <= at + CLOSED_WITHIN_S for at in ingress_deaths)
        went_with_it = in_time and failure.request_id not in ended_by_an_ingress
        (closed if went_with_it else failed).append(failure)
    return closed, failed


class Recovery:
    """Times from kills until all engines and ingresses are up again, as Serve sees them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._open: list[tuple[float, bool]] = []  # time of a kill, and whether a gap was seen since

    @property
    def complete(self) -> bool:
        return not self._open

    def killed(self) -> None:
        self._open.append((time.monotonic(), False))

    def look(self) -> None:
        """Note how many are up now."""
        if running_engines() < ENGINES or running_ingresses() < INGRESSES:
            self._open = [(at, True) for at, _ in self._open]
            return
        self.seconds += [time.monotonic() - at for at, seen in self._open if seen]
        self._open = [(at, seen) for at, seen in self._open if not seen]


def running_engines() -> int:
    """Engines that Serve counts as running."""
    running = _running()
    return sum(running.values()) - running.get("Ingress", 0)


def running_ingresses() -> int:
    """Ingresses that Serve counts as running."""
    return _running().get("Ingress", 0)


def _running() -> dict[str, int]:
    from ray import serve

    deployments = serve.status().applications[APP].deployments
    return {
        name: sum(count for which, count in state.replica_states.items() if str(which) == "RUNNING")
        for name, state in deployments.items()
    }


class Chaos:
    """Kills at random times, and what came of it so far."""

    def __init__(self, cluster: FakeCluster, *, seed: int) -> None:
        self.recovery = Recovery()
        self.counts = {"shard": 0, "replica": 0, "ingress": 0, "node": 0}
        self.ingress_deaths: list[float] = []
        self._cluster = cluster
        self._rng = random.Random(seed)

    def cause(self, *, kills: int, ingress_kills: int, seconds: float, remove_node: bool) -> None:
        """Kill over so many seconds (more on a machine too slow for that), until all is up again.

        Args:
            kills: of shards and replicas, the node that is taken away among them.
            ingress_kills: of ingresses, besides.
            seconds: in which all happen.
            remove_node: whether a node is taken away.
        """
        what = [("shard", "replica")[number % 2] for number in range(kills)]
        self._rng.shuffle(what)
        if remove_node:
            what[kills // 2] = "node"
        for _ in range(ingress_kills):
            what.insert(self._rng.randrange(len(what) + 1), "ingress")
        started = time.monotonic()
        for kind, at in zip(what, sorted(self._rng.uniform(0, seconds) for _ in what), strict=True):
            while time.monotonic() - started < at:
                self._look()
            if kind == "node":
                removed = self._cluster.remove(self._rng.choice(self._cluster.nodes)[1])
                self._killed(kind)
                self._cluster.add(removed)
                continue
            os.kill(self._victim(kind), signal.SIGKILL)
            self._killed(kind)
        deadline = time.monotonic() + RECOVERY_S
        while not self.recovery.complete and time.monotonic() < deadline:
            self._look()

    def _killed(self, kind: str) -> None:
        self.recovery.killed()
        self.counts[kind] += 1
        if kind == "ingress":
            self.ingress_deaths.append(time.monotonic())

    def _look(self) -> None:
        self.recovery.look()
        time.sleep(POLL_S)

    def _victim(self, kind: str) -> int:
        """A process to kill, of an engine or an ingress that is up or of one that is starting.

        Waits until half of the engines are up and most of the ingresses, so that there is always load to disturb: on a
        machine that takes long to start them, kills would otherwise hit each as it comes up.
        """
        deadline = time.monotonic() + RECOVERY_S
        while time.monotonic() < deadline:
            self.recovery.look()
            victims = list(self._cluster.processes(PROCESSES[kind]))
            if victims and running_engines() >= ENGINES // 2 and running_ingresses() > INGRESSES // 2:
                return self._rng.choice(victims)
            time.sleep(POLL_S)
        raise RuntimeError(f"too few engines or ingresses came up within {RECOVERY_S:g} s")


def leftovers(cluster: FakeCluster) -> list[str]:
    """What should not be there while the application idles with all processes up; one line each."""
    import ray
    from ray.util import list_named_actors, placement_group_table

    found = []
    for kind, count in EXPECTED.items():
        if len(processes := cluster.processes(PROCESSES[kind])) != count:
            found.append(f"{len(processes)} processes of kind {kind}, expected {count}")
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    if len(groups) != ENGINES:
        found.append(f"{len(groups)} placement groups, expected {ENGINES}")
    for actor in list_named_actors(all_namespaces=True):
        handle = ray.get_actor(actor["name"], actor["namespace"])
        if actor["name"].startswith(f"{APP}-") and actor["name"].endswith("-shard-0"):
            load = ray.get(handle.check.remote(), timeout=60)
            if load.free_blocks != load.total_blocks or load.running_requests or load.waiting_requests:
                found.append(f"{actor['name']}: {load}")
        elif f"{APP}#EngineReplica" in actor["name"] and (
            leases := ray.get(handle.get_num_ongoing_requests.remote(), timeout=60)
        ):
            found.append(f"{actor['name']}: {leases} leases")
    return found


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
