"""Values that would only fail later, in an event of KubeRay's that nobody watches: refused at once, by their names."""

from __future__ import annotations

from typing import Any

import pytest
from rendering import ChartError, groups, notes, render, serve_config, validate

from deployments.config import AppConfig

H20 = {"name": "a", "accelerator_type": "H20"}


def pool(**options: Any) -> dict[str, Any]:
    return {"pools": [{**H20, **options}]}


def worker(**options: Any) -> dict[str, Any]:
    return pool(worker=options)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image": {"repository": ""}}, ["image.repository"]),
        ({"image": {"tag": "a b"}}, ["image.tag"]),
        ({"image": {"pullSecrets": [{"name": ""}]}}, ["image.pullSecrets.0.name"]),
        ({"model": {"cache": {"mountPath": "/"}}}, ["model.cache", "mountPath"]),
        ({"model": {"cache": {"mountPath": "/tmp/"}}}, ["model.cache", "/tmp"]),
        ({"model": {"cache": {"mountPath": "/a: b"}}}, ["model.cache.mountPath"]),
        ({"model": {"cache": {"hostPath": {"path": "models"}}}}, ["model.cache.hostPath.path"]),
        ({"model": {"cache": {"pvc": {"size": ""}}}}, ["model.cache.pvc.size"]),
        ({"model": {"cache": {"pvc": {"accessModes": []}}}}, ["model.cache.pvc.accessModes"]),
        ({"model": {"cache": {"pvc": {"existingClaim": "A_b"}}}}, ["model.cache.pvc.existingClaim"]),
        ({"model": {"hub": {"tokenSecret": "s", "tokenKey": ""}}}, ["model.hub.tokenKey"]),
        (worker(sharedMemory="much"), ["worker.sharedMemory"]),
        (worker(resources={"requests": {"cpu": "many"}}), ["worker.resources.requests.cpu"]),
        (worker(resources={"limits": {"nvidia.com/gpu": 3}}), ["pools.a", "nvidia.com/gpu", "worker.gpus"]),
        (worker(gpus=0), ["pools.a: worker.gpus is 0"]),
        (pool(accelerator_type=None, worker={"gpus": 1}), ["pools.a: worker.gpus is 1", "accelerator_type"]),
        (worker(gpus=10**12), ["worker.gpus"]),
        (worker(gpuResource=""), ["worker.gpuResource"]),
        (worker(nodeSelector={"a b": "c"}), ["worker.nodeSelector", "a b"]),
        (worker(nodeSelector={"a": "c d"}), ["worker.nodeSelector.a"]),
        (worker(tolerations=None), ["worker.tolerations"]),
        (worker(env=[{"name": "A"}, {"name": "A"}]), ["pools.a: worker.env", '"A"']),
        (worker(env=[{"name": "A B"}]), ["env.0.name"]),
        (worker(volumes=[{"name": "tmp", "emptyDir": {}}]), ["pools.a: worker.volumes", '"tmp"']),
        (worker(volumes=[{"name": "a"}]), ["worker.volumes.0"]),
        (worker(volumeMounts=[{"name": "tmp", "mountPath": "/models/"}]), ["worker.volumeMounts", "/models"]),
        (worker(volumeMounts=[{"name": "disk", "mountPath": "/disk"}]), ["worker.volumeMounts", '"disk"']),
        ({"ray": {"head": {"env": [{"name": "A"}, {"name": "A"}]}}}, ["ray.head.env"]),
        (pool(accelerator_type="H'20"), ["accelerator_type"]),
        (pool(replicas=0), ["replicas"]),
        (pool(replicas=10**10), ["replicas"]),
        (pool(replicas={"min": 1, "max": 3, "initial": 7}), ["replicas", "initial (7)"]),
        (pool(replicas={"min": 1, "max": 3, "initial": 0}), ["replicas", "initial (0)"]),
        (pool(resources={"CPU": 1}), ["resources", "CPU"]),
        ({"frontend": {"replicas": 0}}, ["frontend.replicas"]),
        ({"frontend": {"replicas": None}}, ["frontend", "replicas is required"]),
        ({"ray": {"head": {"resources": None}}}, ["ray.head", "resources is required"]),
        ({"pools": None}, ["pools is required"]),
        ({"engine": None}, ["engine is required"]),
        ({"config": None}, ["config is required"]),
        ({"podSecurityContext": None}, ["podSecurityContext is required"]),
        ({"ingress": {"enabled": True, "hosts": []}}, ["ingress.hosts"]),
        ({"ingress": {"enabled": True, "hosts": ["A_b"]}}, ["ingress.hosts.0"]),
        ({"terminationGracePeriodSeconds": 10**12}, ["terminationGracePeriodSeconds"]),
        ({"ray": {"gcsFaultTolerance": {"redisAddress": "redis.db"}}}, ["redisAddress"]),
        ({"ray": {"gcsFaultTolerance": {"passwordKey": ""}}}, ["passwordKey"]),
        ({"ray": {"upgrade": {"intervalSeconds": 0}}}, ["ray.upgrade.intervalSeconds"]),
        ({"monitoring": {"podMonitor": {"interval": "soon"}}}, ["monitoring.podMonitor.interval"]),
        ({"serviceAccount": {"name": "A b"}}, ["serviceAccount.name"]),
        ({"service": {"port": 0}}, ["service.port"]),
        ({"test": {"url": "api.example"}}, ["test.url"]),
    ],
)
def test_it_is_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ChartError) as refused:
        render(values)
    for word in words:
        assert word in str(refused.value)
    assert "YAML parse error" not in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        pool(name="123"),
        pool(name="true"),
        pool(name="a" * 30, accelerator_type="GeForce-RTX-4090"),
        pool(accelerator_type=None),
        pool(replicas={"min": 0, "max": 3, "initial": None}),
        worker(gpus=2**20, rayCpus=2**21),
        {"nameOverride": "123", "fullnameOverride": "a" * 63},
        {"image": {"repository": "registry.example:5000/a/b", "digest": "sha256:" + "0" * 64, "tag": "x"}},
        {"model": {"path": "a: b # c", "served_model_name": "{{ x }}: #", "cache": {"mountPath": "/weights/"}}},
        {"model": {"cache": {"type": "hostPath", "hostPath": {"path": "/a, type: File}"}}}},
        {"ingress": {"enabled": True, "hosts": ["*.example.com"]}},
        {"frontend": {"workers": {"min": 0, "max": 0}}, **pool(replicas={"min": 0, "max": 1})},
        {"terminationGracePeriodSeconds": 0},
        {"terminationGracePeriodSeconds": 2_000_000, "ray": {"upgrade": {"deletionDelaySeconds": 2_000_000}}},
        {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
        {"monitoring": {"podMonitor": {"enabled": True, "labels": {"app.kubernetes.io/name": "mine"}}}},
    ],
)
def test_what_is_odd_but_right_is_taken(values: dict[str, Any]) -> None:
    objects = render(values)
    validate(objects)
    (application,) = serve_config(objects)["applications"]
    AppConfig.model_validate(application["args"])


def test_ones_own_variables_take_the_place_of_the_charts() -> None:
    """The API server takes no name twice (x-kubernetes-list-map-keys)."""
    own = [{"name": "TRITON_CACHE_DIR", "value": "/cache"}, {"name": "HF_TOKEN", "value": "none"}]
    objects = render({**worker(env=own), "model": {"hub": {"tokenSecret": "hub"}}})
    validate(objects)
    head, _, pods = (group["template"]["spec"]["containers"][0]["env"] for group in groups(objects))
    assert [variable for variable in pods if variable["name"] in ("TRITON_CACHE_DIR", "HF_TOKEN")] == own
    assert {"name": "TRITON_CACHE_DIR", "value": "/tmp/triton"} in head


POOLS = [{"name": "h20", "accelerator_type": "H20"}, {"name": "a100", "accelerator_type": "A100"}]


def test_pools_that_would_take_each_others_gpus_are_pointed_out() -> None:
    assert "pools h20 and a100 want different GPUs" in notes({"pools": POOLS})
    placed = [{**each, "worker": {"nodeSelector": {"gpu": each["name"]}}} for each in POOLS]
    assert "want different GPUs" not in notes({"pools": placed})


def test_a_monitor_behind_a_closed_door_is_pointed_out() -> None:
    on = {"monitoring": {"podMonitor": {"enabled": True}}}
    assert "networkPolicy.monitoring is empty" in notes(on)
    assert "networkPolicy.monitoring" not in notes({**on, "networkPolicy": {"monitoring": [{"namespaceSelector": {}}]}})
    assert "networkPolicy.monitoring" not in notes({**on, "networkPolicy": {"enabled": False}})
