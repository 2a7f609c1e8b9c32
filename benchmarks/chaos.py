"""Kills under load: engines are lost at random while clients stream, and no client may notice.

A fake cluster has two pools, H20 and A100, with two engines each. Clients ask for known answers, streamed and whole;
meanwhile shards and replicas are killed with -9, and a node is taken away. Every answer must be what it was before the
first kill, to the token, and afterwards nothing may be left over. The result is a file in ``benchmarks/results``.

    python -m benchmarks.chaos --kills 30 --seconds 360
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import report
from benchmarks.fake_cluster import FRONT, FakeCluster, NodeKind

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "ernie-tiny" / "bf16"
APP = "chaos"
ENGINES = 4
KINDS = (NodeKind("H20", 2), NodeKind("A100", 2))
POLL_S = 0.5
RECOVERY_S = 300.0
SHARD, REPLICA = "ray::Shard", "ray::ServeReplica:chaos:EngineReplica"


def application_args() -> dict[str, Any]:
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
        "ingress": {"resources": {FRONT: 0.01}},  # its death is what a client does notice
        "health": {"check_period_s": 1.0, "drain_timeout_s": 10.0},
        "routing": {"admission": False},
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client has received."""

    text: str
    tokens: list[str]
    logprobs: list[float]
    finish_reason: str | None

    def differs(self, other: Answer) -> bool:
        """Whether any token is another one, or a log probability is off by more than rounding."""
        same = (self.text, self.tokens, self.finish_reason) == (other.text, other.tokens, other.finish_reason)
        return not same or any(abs(a - b) > 1e-3 for a, b in zip(self.logprobs, other.logprobs, strict=True))


def questions(count: int, *, tokens: int) -> list[dict[str, Any]]:
    """Completion requests, half of them greedy and half sampled with a seed."""
    rng = random.Random(5)
    return [
        {
            "model": APP,
            "prompt": [rng.randrange(300, 7000) for _ in range(rng.choice([4, 20, 50]))],
            "max_tokens": rng.randrange(tokens // 2, tokens),
            "temperature": float(i % 2),
            "seed": i,
            "logprobs": 1,
            "ignore_eos": True,
        }
        for i in range(count)
    ]


async def ask(client: httpx.AsyncClient, question: dict[str, Any], *, stream: bool) -> Answer:
    """One request; raises for any answer but a complete one."""
    if not stream:
        response = await client.post("/v1/completions", json=question)
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {response.text[:300]}")
        return _answer([response.json()["choices"][0]])
    choices = []
    async with client.stream("POST", "/v1/completions", json={**question, "stream": True}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return _answer(choices)
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"in the stream: {chunk['error']}")
            choices += chunk["choices"]
    raise RuntimeError("the stream ended without [DONE]")


def _answer(choices: list[dict[str, Any]]) -> Answer:
    parts = [choice["logprobs"] or {} for choice in choices]
    return Answer(
        "".join(choice["text"] for choice in choices),
        [token for part in parts for token in part.get("tokens", [])],
        [value for part in parts for value in part.get("token_logprobs", [])],
        choices[-1]["finish_reason"],
    )


@dataclass
class Load:
    """Clients that ask one request after the other, in a thread of their own, until :meth:`stop`."""

    url: str
    asked: list[dict[str, Any]]
    clients: int
    expected: list[Answer] = field(default_factory=list)
    served: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def learn(self) -> None:
        """Ask everything once, undisturbed; later answers must be these."""

        async def run() -> None:
            async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
                self.expected = [await ask(client, question, stream=False) for question in self.asked]

        asyncio.run(run())

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._thread.start()

    def stop(self) -> None:
        """Let every client finish the request it is at."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=RECOVERY_S) as client:
            await asyncio.gather(*(self._client(client, number) for number in range(self.clients)))

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(number)
        while not self._stopping.is_set():
            which = rng.randrange(len(self.asked))
            stream = number % 2 == 0
            started = time.monotonic()
            try:
                answer = await ask(client, self.asked[which], stream=stream)
            except Exception as error:
                self.failures.append(f"question {which}, stream {stream}: {type(error).__name__}: {error}")
                continue
            self.served += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            if answer.differs(self.expected[which]):
                self.failures.append(f"question {which}, stream {stream}: altered: {answer.text!r}")


class Recovery:
    """Times from kills until all engines are up again, as Serve sees them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._open: list[tuple[float, bool]] = []  # time of a kill, and whether a gap was seen since

    @property
    def complete(self) -> bool:
        return not self._open

    def killed(self) -> None:
        self._open.append((time.monotonic(), False))

    def look(self) -> None:
        """Note how many engines are up now."""
        if running_engines() < ENGINES:
            self._open = [(at, True) for at, _ in self._open]
            return
        self.seconds += [time.monotonic() - at for at, seen in self._open if seen]
        self._open = [(at, seen) for at, seen in self._open if not seen]


def running_engines() -> int:
    """Engines that Serve counts as running."""
    from ray import serve

    deployments = serve.status().applications[APP].deployments
    states = [state for name, state in deployments.items() if name != "Ingress"]
    return sum(count for state in states for which, count in state.replica_states.items() if str(which) == "RUNNING")


def cause_chaos(
    cluster: FakeCluster, *, kills: int, seconds: float, seed: int, remove_node: bool
) -> tuple[Recovery, dict[str, int]]:
    """Kill at random times over so many seconds (more on a machine too slow for that), until all engines are up."""
    rng = random.Random(seed)
    times = sorted(rng.uniform(0, seconds) for _ in range(kills))
    node_at = kills // 2 if remove_node else -1
    recovery, counts = Recovery(), {"shard": 0, "replica": 0, "node": 0}
    started = time.monotonic()
    for number, at in enumerate(times):
        while time.monotonic() - started < at:
            recovery.look()
            time.sleep(POLL_S)
        if number == node_at:
            kind = cluster.remove(rng.choice(cluster.nodes)[1])
            recovery.killed()
            counts["node"] += 1
            cluster.add(kind)
            continue
        what = rng.choice(["shard", "replica"])
        victim = _victim(cluster, what, rng=rng, recovery=recovery)
        os.kill(victim, signal.SIGKILL)
        recovery.killed()
        counts[what] += 1
    deadline = time.monotonic() + RECOVERY_S
    while not recovery.complete and time.monotonic() < deadline:
        recovery.look()
        time.sleep(POLL_S)
    return recovery, counts


def _victim(cluster: FakeCluster, what: str, *, rng: random.Random, recovery: Recovery) -> int:
    """A process to kill, of an engine that is up or of one that is starting.

    Waits until half of the engines are up, so that there is always load to disturb: on a machine that takes long to
    start engines, kills would otherwise hit each as it comes up.
    """
    deadline = time.monotonic() + RECOVERY_S
    while time.monotonic() < deadline:
        recovery.look()
        victims = list(cluster.processes(SHARD if what == "shard" else REPLICA))
        if victims and running_engines() >= ENGINES // 2:
            return rng.choice(victims)
        time.sleep(POLL_S)
    raise RuntimeError(f"too few engines came up within {RECOVERY_S:g} s")


def leftovers(cluster: FakeCluster) -> list[str]:
    """What should not be there while the application idles with all engines up; one line each."""
    import ray
    from ray.util import list_named_actors, placement_group_table

    found = []
    for title, count in ((SHARD, ENGINES), (REPLICA, ENGINES)):
        if len(processes := cluster.processes(title)) != count:
            found.append(f"{len(processes)} processes {title}, expected {count}")
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    if len(groups) != ENGINES:
        found.append(f"{len(groups)} placement groups, expected {ENGINES}")
    for actor in list_named_actors(all_namespaces=True):
        if actor["name"].startswith(f"{APP}-") and actor["name"].endswith("-shard-0"):
            load = ray.get(ray.get_actor(actor["name"], actor["namespace"]).check.remote(), timeout=60)
            if load.free_blocks != load.total_blocks or load.running_requests or load.waiting_requests:
                found.append(f"{actor['name']}: {load}")
    return found


def run_chaos(
    *, kills: int, seconds: float, clients: int = 6, seed: int = 0, remove_node: bool = True
) -> dict[str, Any]:
    """All of it; the result as the JSON file has it."""
    from ray import serve

    from deployments.app import build

    with FakeCluster(KINDS, http=True) as cluster:
        serve.run(build(application_args()), name=APP)
        deadline = time.monotonic() + RECOVERY_S
        while running_engines() < ENGINES and time.monotonic() < deadline:
            time.sleep(POLL_S)
        load = Load(cluster.url, questions(24, tokens=120), clients)
        load.learn()
        load.start()
        try:
            recovery, counts = cause_chaos(cluster, kills=kills, seconds=seconds, seed=seed, remove_node=remove_node)
        finally:
            load.stop()
        time.sleep(POLL_S)  # the last requests' leases end
        found = leftovers(cluster)
        serve.delete(APP)
        deadline = time.monotonic() + 30
        while (left := cluster.processes(SHARD, REPLICA)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        found += [f"after the end: {title}" for title in left.values()]
    return {
        "kills": counts,
        "seconds": seconds,
        "clients": clients,
        "served": load.served,
        "failed_or_altered": len(load.failures),
        "failures": load.failures[:20],
        "slowest_request_s": round(load.slowest_s, 2),
        "full_capacity_after_s": {
            "measured": len(recovery.seconds),
            "p50": round(statistics.median(recovery.seconds), 2) if recovery.seconds else None,
            "max": round(max(recovery.seconds), 2) if recovery.seconds else None,
        },
        "recovered": recovery.complete,
        "leftovers": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file; benchmarks/results/chaos-<date>.json by default")
    options = parser.parse_args()
    context = report.context(["ray", "torch"])
    result = run_chaos(kills=options.kills, seconds=options.seconds, clients=options.clients, seed=options.seed)
    result = {**context, **result}
    if options.out is None:
        print(report.write("chaos", result))
    else:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
