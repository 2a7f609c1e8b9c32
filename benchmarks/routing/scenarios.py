"""What is simulated: fleets, workloads, and rates that reach from easy to more than anyone can serve."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.routing.hardware import A100, ERNIE_21B, ERNIE_300B, H20, Accelerator, Model, Timing, kv_blocks, timing
from benchmarks.routing.traces import LogNormal, Workload
from deployments.routing.types import Replica

BLOCK_SIZE = 64
SHARED = Workload(LogNormal(250, 1.0, 8, 8000), LogNormal(180, 0.8, 4, 1500), groups=16, turns=3)
"""Chat: system prompts shared by many sessions, three turns on average."""
UNSHARED = Workload(LogNormal(700, 0.9, 8, 12000), LogNormal(180, 0.8, 4, 1500))
"""Single requests, every prompt its own."""
LONG = Workload(
    LogNormal(3000, 1.2, 16, 60000), LogNormal(250, 0.8, 4, 1500), groups=8, system=LogNormal(2000, 0.5), turns=3,
    think=LogNormal(15, 0.8, 2, 60), most_prompt_tokens=100_000,
)  # fmt: skip
"""Documents, asked about three times on average."""
BURSTS = Workload(
    LogNormal(250, 1.0, 8, 8000), LogNormal(180, 0.8, 4, 1500), groups=16, turns=3, burst=4.0, burst_s=5.0,
    burst_period_s=30.0,
)  # fmt: skip
"""Chat, of which 4/9 come within a sixth of the time."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Replicas of one pool."""

    pool: str
    count: int
    model: Model
    accelerator: Accelerator
    ranks: int = 1
    max_num_batched_tokens: int = 2048
    speeds: tuple[float, ...] = (1.0,)
    """In turns."""

    def replicas(self, max_model_len: int) -> list[tuple[Replica, Timing]]:
        blocks = kv_blocks(self.model, self.accelerator, ranks=self.ranks, block_size=BLOCK_SIZE)
        return [
            (
                Replica(
                    replica_id=f"{self.pool}-{i}",
                    pool=self.pool,
                    max_model_len=max_model_len,
                    block_size=BLOCK_SIZE,
                    total_blocks=blocks,
                    max_num_seqs=128,
                    max_num_batched_tokens=self.max_num_batched_tokens,
                ),
                timing(self.model, self.accelerator, ranks=self.ranks, speed=self.speeds[i % len(self.speeds)]),
            )
            for i in range(self.count)
        ]


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    about: str
    kinds: tuple[Kind, ...]
    workload: Workload
    rates: tuple[float, ...]
    """Requests a second."""
    seconds: float = 60.0
    warm_up_s: float = 15.0
    """Requests that come earlier are not counted: caches are empty, and nothing has been learned."""
    ingresses: int = 1
    report_s: float = 0.002
    max_model_len: int = 32768
    mixed_shared: bool = False
    """Whether the bar for mixed pools with shared prefixes holds here."""

    def fleet(self) -> list[tuple[Replica, Timing]]:
        return [one for kind in self.kinds for one in kind.replicas(self.max_model_len)]


H20_300B = Kind("h20", 8, ERNIE_300B, H20, max_num_batched_tokens=512)
A100_300B = Kind("a100", 4, ERNIE_300B, A100, ranks=4)
MIXED_300B = (H20_300B, A100_300B)
MIXED_21B = (Kind("h20", 4, ERNIE_21B, H20), Kind("a100", 2, ERNIE_21B, A100, ranks=4))


def _many(count: int) -> tuple[Kind, ...]:
    return (
        Kind("h20", count * 2 // 3, ERNIE_300B, H20, max_num_batched_tokens=512),
        Kind("a100", count - count * 2 // 3, ERNIE_300B, A100, ranks=4),
    )


SCENARIOS = (
    Scenario(
        "mixed 300B", "8 H20 and 4 A100 TP4, shared prefixes", MIXED_300B, SHARED, (16, 26, 36), mixed_shared=True
    ),
    Scenario(
        "mixed 21B", "4 H20 and 2 A100 TP4, shared prefixes", MIXED_21B, SHARED, (140, 170, 200), seconds=40,
        mixed_shared=True,
    ),
    Scenario(
        "mixed, 4 ingresses", "as mixed 300B; loads known 0.25 s late", MIXED_300B, SHARED, (16, 26, 36), ingresses=4,
        report_s=0.25, mixed_shared=True,
    ),
    Scenario(
        "mixed, bursts", "as mixed 300B; four times the rate for 5 of 30 s", MIXED_300B, BURSTS, (12, 20, 28),
        mixed_shared=True,
    ),
    Scenario("mixed, nothing shared", "8 H20 and 4 A100 TP4", MIXED_300B, UNSHARED, (12, 19, 26)),
    Scenario(
        "homogeneous", "8 A100 TP4, shared prefixes",
        (Kind("a100", 8, ERNIE_300B, A100, ranks=4),), SHARED, (30, 42, 54),
    ),
    Scenario(
        "homogeneous, nothing shared", "8 A100 TP4",
        (Kind("a100", 8, ERNIE_300B, A100, ranks=4),), UNSHARED, (20, 30, 40),
    ),
    Scenario(
        "long contexts", "4 H20 and 2 A100 TP4 with the 21B, prompts up to 100,000 tokens", MIXED_21B, LONG,
        (6, 12, 18), max_model_len=131072,
    ),
    Scenario(
        "one pool, uneven", "8 H20 with the 21B, two of them at 0.6 of the speed",
        (Kind("h20", 8, ERNIE_21B, H20, speeds=(1.0, 1.0, 1.0, 0.6)),), SHARED, (80, 120, 160), seconds=40,
    ),
    Scenario(
        "1,000 replicas", "666 H20 and 334 A100 TP4, shared prefixes", _many(1000), SHARED, (2400,), seconds=5,
        warm_up_s=2, mixed_shared=True,
    ),
)  # fmt: skip
