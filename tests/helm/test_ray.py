"""What Ray makes of a pod: its object store within /dev/shm, and its end within what Kubernetes grants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants
from rendering import CHART, groups, render

PRESETS = sorted(path.name for path in CHART.glob("values*.yaml"))
GIB = {"Gi": 2**30, "Mi": 2**20}


def size(quantity: str) -> float:
    return float(quantity[:-2]) * GIB[quantity[-2:]]


def pod(group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's spec and its container's."""
    spec = group["template"]["spec"]
    return spec, spec["containers"][0]


@pytest.mark.parametrize("preset", PRESETS)
def test_object_stores_are_in_memory(preset: str) -> None:
    """Beyond /dev/shm Ray puts the store on the disk below /tmp (determine_plasma_store_config in its services.py); how
    large it would make it, says resolve_object_store_memory in its utils.py."""
    for group in groups(render(preset=preset)):
        spec, container = pod(group)
        (shared,) = [v["emptyDir"]["sizeLimit"] for v in spec["volumes"] if v["name"] == "shared-memory"]
        room = size(shared)
        memory = size(container["resources"]["limits"]["memory"])
        share = memory * ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
        usual = min(share, max(ray_constants.REQUIRE_SHM_SIZE_THRESHOLD, room * 0.95))
        store = float(group["rayStartParams"].get("object-store-memory", usual))
        assert store < room < memory, group.get("groupName", "head")


@pytest.mark.parametrize(("grace", "drain"), [(120, "105"), (600, "585"), (5, "0")])
def test_workers_drain_for_as_long_as_they_may(grace: int, drain: str) -> None:
    """Ray's own limit is shorter than engines and ingresses may take; the head holds up nobody's requests."""
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert f'"{name}"' in Path(ray_constants.__file__).read_text(encoding="utf-8")
    head, *workers = groups(render({"terminationGracePeriodSeconds": grace}))
    assert name not in {variable["name"] for variable in pod(head)[1]["env"]}
    for group in workers:
        spec, container = pod(group)
        assert spec["terminationGracePeriodSeconds"] == grace
        assert {"name": name, "value": drain} in container["env"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_ask_for_no_operator_but_kuberay(preset: str) -> None:
    """An object of a kind that the cluster doesn't have fails the whole installation."""
    for kind, name in (objects := render(preset=preset)):
        group = objects[(kind, name)]["apiVersion"].rpartition("/")[0]
        assert group in {"", "apps", "policy", "networking.k8s.io", "ray.io"}, kind


def test_the_test_ends_before_helm_gives_it_up() -> None:
    """`helm test --timeout` is five minutes by default."""
    (container,) = render()[("Pod", "test-dibit-test")]["spec"]["containers"]
    (seconds,) = [variable["value"] for variable in container["env"] if variable["name"] == "TIMEOUT"]
    assert float(seconds) < 300
