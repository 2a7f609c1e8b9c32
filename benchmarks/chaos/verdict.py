"""What clients lost that they may not lose, and what was left over that should be gone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from benchmarks.chaos.application import APP, ENGINES, EXPECTED, PROCESSES
from benchmarks.fake_cluster import FakeCluster
from benchmarks.steady_load import Failure

CLOSED_WITHIN_S = 10.0
"""Time in which the clients of an ingress hear of its death; what ends later has another cause."""


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
