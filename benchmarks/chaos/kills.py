"""Kills at random times, and the time until all is up again."""

from __future__ import annotations

import os
import random
import signal
import time

from benchmarks.chaos.application import ENGINES, INGRESSES, PROCESSES, running_engines, running_ingresses
from benchmarks.fake_cluster import FakeCluster

POLL_S = 0.5
RECOVERY_S = 300.0


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
