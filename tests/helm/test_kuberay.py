"""What KubeRay makes of the RayService, as its source has it (release of the chart's annotation `dibit/kuberay`).

Each function here says in a few lines what one of KubeRay's does; paths are below `ray-operator/controllers/ray`.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rendering import CHART, ChartError, Objects, groups, notes, render, serve_config, service

POOLS = [
    {"name": "h20", "accelerator_type": "H20", "replicas": {"min": 2, "max": 8}},
    {"name": "a100", "accelerator_type": "A100", "tensor_parallel_size": 4, "replicas": {"min": 1, "max": 4}},
]
WIDE = {"name": "wide", "accelerator_type": "A100", "tensor_parallel_size": 8, "worker": {"gpus": 4}}


def pod_labels(group: Mapping[str, Any]) -> dict[str, str]:
    """Of the pods of a group: the template's win, but for three (labelPod in common/pod.go)."""
    node = "worker" if "groupName" in group else "head"
    own = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"cluster-{node}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    fixed = {"ray.io/cluster": "cluster", "ray.io/node-type": node, "ray.io/group": group.get("groupName", "headgroup")}
    serving = {"ray.io/serve": "true" if node == "worker" else "false"}  # BuildPod, for a RayService
    return {**own, **group["template"]["metadata"]["labels"], **fixed, **serving}


HEAD_SERVICE = {
    "ray.io/cluster": "cluster",
    "ray.io/node-type": "head",
    "ray.io/identifier": "cluster-head",
    "app.kubernetes.io/name": "kuberay",
    "app.kubernetes.io/created-by": "kuberay-operator",
}
"""Selector of `<RayService>-head-svc`: the defaults, whatever the pods' labels (BuildHeadServiceForRayService in
common/service.go passes no labels on)."""


def hashed(objects: Objects) -> dict[str, Any]:
    """What decides over a new cluster: the spec without these (GenerateHashWithoutReplicasAndWorkersToDelete,
    utils/util.go)."""
    cluster = copy.deepcopy(service(objects)["rayClusterConfig"])
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        for name in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(name, None)
        group["template"]["spec"].pop("tolerations", None)
    return dict(cluster)


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return set(selector["matchLabels"].items()) <= set(labels.items())


def test_the_heads_service_finds_the_head() -> None:
    objects = render({"pools": POOLS})
    found = [
        group.get("groupName", "head") for group in groups(objects) if HEAD_SERVICE.items() <= pod_labels(group).items()
    ]
    assert found == ["head"]
    assert f"service/{next(name for kind, name in objects if kind == 'RayService')}-head-svc 8265" in notes()


def test_selectors_match_the_pods_that_kuberay_makes() -> None:
    frontend = {"workers": {"min": 2, "max": 2}}
    objects = render({"pools": POOLS, "frontend": frontend, "monitoring": {"podMonitor": {"enabled": True}}})
    made = {group.get("groupName", "head"): pod_labels(group) for group in groups(objects)}
    # KubeRay's job that clears Redis has the head's labels (buildRedisCleanupJob, raycluster_controller.go).
    made["cleanup"] = made["head"] | {"ray.io/node-type": "redis-cleanup"}
    redis = objects[("StatefulSet", "test-dibit-redis")]["spec"]["template"]["metadata"]["labels"]
    asker = objects[("Pod", "test-dibit-test")]["metadata"]["labels"]
    policy = objects[("NetworkPolicy", "test-dibit")]["spec"]
    for labels in [*made.values(), redis, asker]:
        assert matches(policy["podSelector"], labels)
        assert matches(policy["ingress"][0]["from"][0]["podSelector"], labels)
    assert all(matches(objects[("PodMonitor", "test-dibit")]["spec"]["selector"], labels) for labels in made.values())
    for part, name in [("frontend", "frontend"), ("pool-h20", "h20")]:
        kept = budget(objects, part)["selector"]
        assert [found for found, labels in made.items() if matches(kept, labels)] == [name]
    address = objects[("Service", "test-dibit-redis")]["spec"]["selector"]
    assert address.items() <= redis.items()
    assert not any(address.items() <= labels.items() for labels in [*made.values(), asker])


def test_another_release_of_the_namespace_is_another() -> None:
    one, two = render(release="one"), render(release="two")
    policy = one[("NetworkPolicy", "one-dibit")]["spec"]
    assert not any(matches(policy["podSelector"], pod_labels(group)) for group in groups(two))


def budget(objects: Objects, part: str) -> dict[str, Any]:
    return dict(objects[("PodDisruptionBudget", f"test-dibit-{part}")]["spec"])


@pytest.mark.parametrize(
    ("pool", "away", "least"),
    [
        (POOLS[0], 1, 1),
        (POOLS[0] | {"replicas": 5}, 2, 3),
        (POOLS[0] | {"replicas": 8, "worker": {"gpus": 4}}, 1, 1),  # two pods with four engines each
        (WIDE | {"replicas": 3}, 1, 2),  # six pods, of which three get ready
        (POOLS[0] | {"replicas": 1}, 1, None),
        (POOLS[0] | {"replicas": {"min": 0, "max": 3}}, 0, None),
    ],
)
def test_budgets_count_pods_themselves(pool: dict[str, Any], away: int, least: int | None) -> None:
    """RayCluster has no scale subresource, so of pods it owns Kubernetes only takes `minAvailable`, a number."""
    objects = render({"pools": [pool], "podDisruptionBudget": {"maxUnavailable": away}})
    key = ("PodDisruptionBudget", f"test-dibit-pool-{pool['name']}")
    assert (key in objects) == (least is not None)
    if least is not None:
        spec = objects[key]["spec"]
        assert (spec["minAvailable"], spec["unhealthyPodEvictionPolicy"]) == (least, "AlwaysAllow")
        assert "maxUnavailable" not in spec


def test_probes_are_kuberays() -> None:
    """It adds them where none stand (initLivenessAndReadinessProbe, common/pod.go): over HTTP to Ray's agent from Ray
    2.53 on, and for a worker's readiness also with wget to Serve's proxy on the container's port called "serve"."""
    objects = render({"pools": POOLS})
    for group in groups(objects):
        container = group["template"]["spec"]["containers"][0]
        assert not {"livenessProbe", "readinessProbe", "startupProbe", "lifecycle"} & set(container)
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
        # Not set by us either: the agent's port that they ask, start commands, and what autoscaler v2 forbids.
        assert "dashboard-agent-listen-port" not in group["rayStartParams"]
        assert not {"command", "args"} & set(container)
        assert "restartPolicy" not in group["template"]["spec"]
    assert tuple(map(int, service(objects)["rayClusterConfig"]["rayVersion"].split("."))) >= (2, 53)


def test_the_autoscalers_container_writes_only_to_volumes_of_the_head() -> None:
    cluster = service(render())["rayClusterConfig"]
    options = cluster["autoscalerOptions"]
    volumes = {volume["name"] for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert options["securityContext"]["readOnlyRootFilesystem"] is True
    assert {mount["name"] for mount in options["volumeMounts"]} <= volumes
    home = {variable["name"]: variable["value"] for variable in options["env"]}["HOME"]
    assert {"/tmp", home} == {mount["mountPath"] for mount in options["volumeMounts"]}


def test_bounds_alone_make_no_new_cluster_and_have_to_be_told() -> None:
    before = {"pools": POOLS}
    after = {"pools": [POOLS[0] | {"replicas": {"min": 3, "max": 12}}, POOLS[1]], "frontend": {"workers": {"max": 3}}}
    assert hashed(render(before)) == hashed(render(after))
    # KubeRay then changes nothing in the cluster (shouldUpdateCluster, rayservice_controller.go).
    assert "patch $cluster" not in notes(after)
    said = notes(after, upgrade=True)
    patched = copy.deepcopy(service(render(before))["rayClusterConfig"])
    for step in patch(said):
        _, _, _, index, name = step["path"].split("/")
        patched["workerGroupSpecs"][int(index)][name] = step["value"]
    for group, wanted in zip(patched["workerGroupSpecs"], groups(render(after))[1:], strict=True):
        assert (group["minReplicas"], group["maxReplicas"]) == (wanted["minReplicas"], wanted["maxReplicas"])


def patch(text: str) -> list[dict[str, Any]]:
    (found,) = [line for line in text.splitlines() if "--patch '" in line]
    return list(json.loads(found.split("--patch '")[1].rstrip("'")))


def test_a_pool_at_the_end_joins_and_others_make_a_new_cluster() -> None:
    one, both, swapped = (hashed(render({"pools": pools})) for pools in (POOLS[:1], POOLS, POOLS[::-1]))
    assert both | {"workerGroupSpecs": both["workerGroupSpecs"][:2]} == one  # isClusterSpecHashEqual, partial
    assert swapped | {"workerGroupSpecs": swapped["workerGroupSpecs"][:2]} != one
    assert hashed(render({"pools": POOLS[:1], "engine": {"max_num_seqs": 8}})) == one
    assert hashed(render({"pools": POOLS[:1], "ray": {"head": {"env": [{"name": "A", "value": "b"}]}}})) != one


def test_another_version_of_the_chart_alone_restarts_nothing(tmp_path: Path) -> None:
    chart = tmp_path / "dibit"
    shutil.copytree(CHART, chart)
    metadata = (chart / "Chart.yaml").read_text(encoding="utf-8")
    (chart / "Chart.yaml").write_text(metadata.replace("\nversion: ", "\nversion: 9"), encoding="utf-8")
    old, new = render(), render(chart=chart)
    assert old[("ServiceAccount", "test-dibit")]["metadata"] != new[("ServiceAccount", "test-dibit")]["metadata"]
    assert hashed(old) == hashed(new)
    assert old[("StatefulSet", "test-dibit-redis")]["spec"] == new[("StatefulSet", "test-dibit-redis")]["spec"]


def test_without_the_autoscaler_all_pods_are_there_from_the_start() -> None:
    objects = render({"pools": POOLS, "ray": {"autoscaler": {"enabled": False}}})
    for group in groups(objects)[1:]:
        assert group["replicas"] == group["maxReplicas"]


@pytest.mark.parametrize("release", ["4bit", "two.parts"])
def test_a_name_that_kuberay_refuses_is_refused_here(release: str) -> None:
    """A DNS-1035 label of at most 47 characters (ValidateRayServiceMetadata, utils/validation.go)."""
    with pytest.raises(ChartError, match="fullnameOverride"):
        render(release=release)
    assert ("RayService", "other") in render({"fullnameOverride": "other"}, release=release)


def test_engines_over_several_pods_may_be_placed_so() -> None:
    def args(**pool: Any) -> Any:
        (application,) = serve_config(render({"pools": [WIDE | pool]}))["applications"]
        return application["args"]["pools"][0]

    assert args()["across_nodes"] is True
    assert "across_nodes" not in args(worker={"gpus": 8})
    assert args(worker={"gpus": 8}, across_nodes=False)["across_nodes"] is False
    with pytest.raises(ChartError, match="across_nodes is false"):
        args(across_nodes=False)


INCREMENTAL: dict[str, Any] = {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "istio"}


def test_incremental_upgrades_have_no_service_of_our_name() -> None:
    """KubeRay ignores `serveService` then (BuildServeService, common/service.go) and makes `<name>-gateway`."""
    objects = render({"ray": {"upgrade": INCREMENTAL}})
    assert not [name for kind, name in objects if kind == "Pod"]
    said = notes({"ray": {"upgrade": INCREMENTAL}})
    assert "get gateway test-dibit-gateway" in said
    assert "helm test" not in said
    assert "service/test-dibit 8000" not in said
    asked = render({"ray": {"upgrade": INCREMENTAL}, "test": {"url": "http://gateway.example"}})
    assert ("Pod", "test-dibit-test") in asked


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ingress": {"enabled": True}}, "ingress.enabled"),
        ({"ray": {"autoscaler": {"enabled": False}}}, "ray.autoscaler.enabled"),
        ({"ray": {"upgrade": {"maxSurgePercent": 5}}}, "stepSizePercent"),
    ],
)
def test_what_incremental_upgrades_can_not_have(values: dict[str, Any], words: str) -> None:
    ray = values.get("ray", {})
    upgrade = INCREMENTAL | ray.get("upgrade", {})
    with pytest.raises(ChartError, match=words):
        render({**values, "ray": {**ray, "upgrade": upgrade}})
