"""What a pool asks Ray for, and whether the cluster can give it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from deployments.config import PoolConfig

REPLICA_CPUS = 0.1
"""The EngineReplica process only watches and counts; it shares a core."""

ACCELERATOR = "accelerator_type:"
ACCELERATOR_SHARE = 0.001
"""Ray marks a node that has an accelerator with one unit of ``accelerator_type:<name>``, of which each task takes this
share (``ray.util.accelerators``, ``ray_option_utils``): enough to be placed there, never used up."""

USUAL_ACCELERATORS = 8
"""Accelerators in the machines that people have (HGX, DGX): what is assumed of nodes that have not joined yet."""


def bundles(pool: PoolConfig) -> list[dict[str, float]]:
    """The placement group of one replica: a small bundle for the EngineReplica itself, then one for each rank."""
    rank: dict[str, float] = {"CPU": pool.cpus_per_rank, **pool.resources}
    if pool.accelerator_type is not None:
        rank["GPU"] = 1
        rank[ACCELERATOR + pool.accelerator_type] = ACCELERATOR_SHARE
    return [{"CPU": REPLICA_CPUS}, *(dict(rank) for _ in range(pool.tensor_parallel_size))]


def label_selector(pool: PoolConfig) -> list[dict[str, str]] | None:
    """The node labels that each bundle asks for; None if the pool names none."""
    return [dict(pool.labels) for _ in bundles(pool)] if pool.labels else None


def strategy(pool: PoolConfig, nodes: Iterable[Mapping[str, float]] = ()) -> str:
    """Whether the ranks of one engine must share a node, or may be on several.

    Ranks on accelerators share one, for the sake of NVLink, unless none has room for all of them; on the CPU they may
    spread if they have to. Either way Ray keeps together what fits together.

    Args:
        pool: the pool to place.
        nodes: the resources of each living node, in use or not.
    """
    if pool.across_nodes is not None:
        return "PACK" if pool.across_nodes else "STRICT_PACK"
    if pool.accelerator_type is None:
        return "PACK"
    suitable = [node for node in nodes if holds(node, bundles(pool)[1])]
    if not suitable:  # such nodes may be on their way
        return "STRICT_PACK" if pool.tensor_parallel_size <= USUAL_ACCELERATORS else "PACK"
    whole = total(bundles(pool))
    return "STRICT_PACK" if any(holds(node, whole) for node in suitable) else "PACK"


def missing(pool: PoolConfig, cluster: Mapping[str, float]) -> str:
    """What the cluster lacks to hold the least number of replicas of a pool, in words; empty if it suffices.

    Args:
        pool: the pool to place.
        cluster: ``ray.cluster_resources()``: all there is on all nodes, in use or not.
    """
    lacking = [
        f"GPUs of type {pool.accelerator_type} (no node has one)"
        if name.startswith(ACCELERATOR)
        else f"{amount:g} {name} (the cluster has {cluster.get(name, 0):g})"
        for name, amount in total(bundles(pool) * pool.replicas.min).items()
        if not holds(cluster, {name: amount})
    ]
    if not lacking:
        return ""
    return (
        f"pool {pool.name!r} needs {' and '.join(lacking)} for {pool.replicas.min} replica(s) of "
        f"{pool.tensor_parallel_size} rank(s)"
    )


def total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of several bundles."""
    summed: Counter[str] = Counter()
    for bundle in parts:
        for name, amount in bundle.items():
            summed[name] += amount  # type: ignore[assignment]  # Counter adds floats as well
    return dict(summed)


def holds(node: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    """Whether a node has so much of everything."""
    return all(node.get(name, 0) + 1e-6 >= amount for name, amount in needed.items())
