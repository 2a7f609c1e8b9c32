"""What a pool asks Ray for, and whether the cluster can give it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from deployments.config import PoolConfig

REPLICA_CPUS = 0.1
"""The EngineReplica process only watches and counts; it shares a core."""

ACCELERATOR_SHARE = 0.001
"""Ray marks a node that has an accelerator with one unit of ``accelerator_type:<name>``, of which each task takes this
share (``ray.util.accelerators``, ``ray_option_utils``): enough to be placed there, never used up."""


def bundles(pool: PoolConfig) -> list[dict[str, float]]:
    """The placement group of one replica: a small bundle for the EngineReplica itself, then one for each rank."""
    rank: dict[str, float] = {"CPU": pool.cpus_per_rank}
    if pool.accelerator_type is not None:
        rank["GPU"] = 1
        rank[f"accelerator_type:{pool.accelerator_type}"] = ACCELERATOR_SHARE
    return [{"CPU": REPLICA_CPUS}, *(dict(rank) for _ in range(pool.tensor_parallel_size))]


def strategy(pool: PoolConfig) -> str:
    """Ranks on accelerators must share a node, for the sake of NVLink; on the CPU they may spread if they have to."""
    return "STRICT_PACK" if pool.accelerator_type is not None else "PACK"


def missing(pool: PoolConfig, cluster: Mapping[str, float]) -> str:
    """What the cluster lacks to hold the least number of replicas of a pool, in words; empty if it suffices.

    Args:
        pool: the pool to place.
        cluster: ``ray.cluster_resources()``: all there is on all nodes, in use or not.
    """
    needed: Counter[str] = Counter()
    for bundle in bundles(pool):
        for name, amount in bundle.items():
            needed[name] += amount * pool.replicas.min  # type: ignore[assignment]  # Counter adds floats as well
    lacking = [
        f"{amount:g} {name} (the cluster has {cluster.get(name, 0):g})"
        for name, amount in needed.items()
        if cluster.get(name, 0) + 1e-6 < amount
    ]
    if not lacking:
        return ""
    return (
        f"pool {pool.name!r} needs {' and '.join(lacking)} for {pool.replicas.min} replica(s) of "
        f"{pool.tensor_parallel_size} rank(s)"
    )
