"""Whatever valid values say, the objects are valid, and the application understands its part."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rendering import render, serve_config, service, validate

from deployments.config import AppConfig

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,12}[a-z0-9]", fullmatch=True)
LABELS = st.dictionaries(NAMES, NAMES, max_size=2)


@st.composite
def bounds(draw: st.DrawFn, least: int) -> Any:
    low = draw(st.integers(least, 8))
    return draw(st.sampled_from([max(low, 1), {"min": low, "max": draw(st.integers(max(low, 1), 20))}]))


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    ranks = draw(st.sampled_from([1, 2, 4, 8]))
    accelerator = draw(st.sampled_from([None, "H20", "A100"]))
    pool: dict[str, Any] = {
        "name": draw(NAMES.filter(lambda name: name != "frontend")),
        "tensor_parallel_size": ranks,
        "replicas": draw(bounds(1)),
        "worker": {"nodeSelector": draw(LABELS), "annotations": draw(LABELS)},
    }
    if accelerator:
        pool["accelerator_type"] = accelerator
        pool["worker"]["gpus"] = draw(
            st.sampled_from([gpus for gpus in (1, 2, 4, 8) if ranks % gpus == 0 or gpus > ranks])
        )
    return pool


@st.composite
def all_values(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "nameOverride": draw(st.sampled_from(["", "x", "a-name-of-more-than-forty-characters-is-cut-somewhere"])),
        "pools": draw(st.lists(pools(), min_size=1, max_size=3, unique_by=lambda pool: pool["name"])),
        "engine": draw(st.sampled_from([{}, {"max_model_len": 4096, "kv_cache_dtype": "int8"}])),
        "frontend": {
            "replicas": draw(bounds(1)),
            "nodeSelector": draw(LABELS),
            "haproxy": draw(st.booleans()),
            "priorityClassName": draw(st.sampled_from(["", "high"])),
        },
        "model": {"cache": {"type": draw(st.sampled_from(["pvc", "hostPath", "emptyDir"]))}},
        "ray": {
            "autoscaler": {"enabled": draw(st.booleans())},
            "auth": {"enabled": draw(st.booleans())},
            "gcsFaultTolerance": {"enabled": draw(st.booleans())},
            "upgrade": {"type": draw(st.sampled_from(["NewCluster", "None"]))},
        },
        "networkPolicy": {"enabled": draw(st.booleans())},
        "podDisruptionBudget": {"enabled": draw(st.booleans()), "maxUnavailable": draw(st.integers(0, 3))},
        "monitoring": {
            "podMonitor": {"enabled": draw(st.booleans())},
            "prometheusRule": {"enabled": draw(st.booleans())},
        },
        "serviceAccount": {"create": draw(st.booleans()), "annotations": draw(LABELS)},
        "service": {"port": draw(st.integers(1, 65535)), "annotations": draw(LABELS)},
    }


@given(all_values())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_values(values: dict[str, Any]) -> None:
    objects = render(values)
    validate(objects)
    (application,) = serve_config(objects)["applications"]
    config = AppConfig.model_validate(application["args"])
    assert [pool.name for pool in config.pools] == [pool["name"] for pool in values["pools"]]
    groups = {group["groupName"]: group for group in service(objects)["rayClusterConfig"]["workerGroupSpecs"]}
    for pool in config.pools:
        group = groups[pool.name]
        gpus = int(group["rayStartParams"]["num-gpus"])
        for engines, workers in ((pool.replicas.min, "minReplicas"), (pool.replicas.max, "maxReplicas")):
            ranks = engines * pool.tensor_parallel_size
            if pool.accelerator_type is None:
                assert group[workers] >= engines
            else:  # enough GPUs, and no pod too many
                assert group[workers] * gpus >= ranks > (group[workers] - 1) * gpus or gpus % pool.tensor_parallel_size
