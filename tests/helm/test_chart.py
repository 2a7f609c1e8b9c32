"""The chart as rendered: valid objects, the application's own configuration, closed doors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from rendering import CHART, ChartError, Objects, groups, helm, render, serve_config, service, validate

from deployments.config import AppConfig
from deployments.observability.metrics import Metrics
from deployments.observability.registry import Histogram
from tests.promql import selectors

PRESETS = sorted(path.name for path in CHART.glob("values*.yaml"))
EVERYTHING = {
    "monitoring": {
        "podMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
        "dashboard": {"enabled": True},
    },
    "ingress": {"enabled": True, "tlsSecret": "certificate"},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
    "apiKeys": {"secret": "dibit-keys"},
    "model": {"hub": {"tokenSecret": "hub"}},
    "networkPolicy": {"monitoring": [{"namespaceSelector": {}}]},
}


def containers(objects: Objects) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every container: where it is, its pod's spec, itself."""

    def pods(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(node, dict):
            if isinstance(node.get("containers"), list):
                yield path, node
            for key, value in node.items():
                yield from pods(value, f"{path}.{key}")
        elif isinstance(node, list):
            for number, value in enumerate(node):
                yield from pods(value, f"{path}[{number}]")

    for (kind, name), document in objects.items():
        for path, pod in pods(document, f"{kind}/{name}"):
            for container in pod["containers"]:
                yield path, pod, container


def test_generated_files_are_up_to_date() -> None:
    command = [sys.executable, str(CHART.parent / "generate.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(CHART.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_value_is_explained() -> None:
    source = (CHART / "values.yaml").read_text(encoding="utf-8")
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    for path in leaves(yaml.safe_load(source)):
        shown = path.replace("pools.", "pools[].")
        parents = [shown.rsplit(".", cut)[0] for cut in range(4) if shown.count(".") >= cut]
        assert any(f"`{parent}`" in readme for parent in parents), f"{path} has no line '# -- ...' in values.yaml"


def leaves(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, list) and path == "pools":
        node = node[0]
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_lint(preset: str) -> None:
    helm("lint", "--strict", str(CHART), "--values", str(CHART / preset))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("extra", [None, EVERYTHING], ids=["plain", "everything"])
def test_presets_make_valid_objects(preset: str, extra: dict[str, Any] | None) -> None:
    validate(render(extra, preset=preset))


@pytest.mark.parametrize("preset", PRESETS)
def test_serve_config_is_what_the_application_reads(preset: str) -> None:
    config = serve_config(render(EVERYTHING, preset=preset))
    (application,) = config["applications"]
    assert application["import_path"] == "deployments.app:build"
    AppConfig.model_validate(application["args"])
    assert config["http_options"]["port"] == 8000


@pytest.mark.parametrize("preset", PRESETS)
def test_pods_are_confined(preset: str) -> None:
    seen = 0
    for path, pod, container in containers(render(EVERYTHING, preset=preset)):
        seen += 1
        assert pod["securityContext"]["runAsNonRoot"] is True, path
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, path
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, path
        assert context["readOnlyRootFilesystem"] is True, path
        assert context["capabilities"] == {"drop": ["ALL"]}, path
        assert container["resources"]["limits"]["memory"], path
        assert not any(variable.get("value", "").startswith(("hf_", "sk-")) for variable in container["env"])
    assert seen >= 4


def test_only_the_http_port_is_open_to_everybody() -> None:
    policy = render(EVERYTHING)[("NetworkPolicy", "test-dibit")]
    for rule in policy["spec"]["ingress"]:
        if "from" not in rule:
            assert [port["port"] for port in rule["ports"]] == [8000]
        elif "ports" not in rule:
            selectors = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
            assert selectors == [policy["spec"]["podSelector"]["matchLabels"]]


def test_metrics_are_closed_until_somebody_is_named() -> None:
    rules = render()[("NetworkPolicy", "test-dibit")]["spec"]["ingress"]
    opened = {port["port"] for rule in rules for port in rule.get("ports", [])}
    assert opened == {8000, 8265}  # clients; and the operator


def test_secrets_come_from_secrets() -> None:
    objects = render(EVERYTHING)
    for path, _, container in containers(objects):
        for variable in container["env"]:
            if any(word in variable["name"] for word in ("TOKEN", "PASSWORD", "KEY")):
                assert "secretKeyRef" in variable["valueFrom"], f"{path}: {variable['name']}"
    assert service(objects)["rayClusterConfig"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize(
    ("ranks", "gpus", "engines", "pods"),
    [(1, 1, 3, 3), (1, 8, 3, 1), (1, 8, 9, 2), (4, 4, 2, 2), (4, 8, 3, 2), (8, 4, 2, 4), (3, 8, 5, 3)],
)
def test_workers_hold_the_engines(ranks: int, gpus: int, engines: int, pods: int) -> None:
    pool = {"name": "p", "accelerator_type": "H20", "tensor_parallel_size": ranks, "worker": {"gpus": gpus}}
    objects = render({"pools": [pool | {"replicas": {"min": 0, "max": engines}}]})
    group = service(objects)["rayClusterConfig"]["workerGroupSpecs"][1]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (0, 0, pods)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == gpus
    assert group["rayStartParams"]["resources"] == "'{\"accelerator_type:H20\": 1}'"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ray": {"hed": {}}}, ["hed"]),
        ({"engine": {"max_modell_len": 1}}, ["max_modell_len"]),
        ({"engine": {"kv_cache_dtype": "fp3"}}, ["kv_cache_dtype"]),
        ({"pools": []}, ["pools"]),
        ({"pools": [{"name": "A b"}]}, ["pools.0.name"]),
        ({"pools": [{"name": "a", "tensor_parallel_size": 0}]}, ["tensor_parallel_size"]),
        ({"pools": [{"name": "a"}, {"name": "a"}]}, ["pools", "a", "taken"]),
        ({"pools": [{"name": "frontend"}]}, ["frontend", "taken"]),
        (
            {"pools": [{"name": "a", "accelerator_type": "H20", "tensor_parallel_size": 6, "worker": {"gpus": 4}}]},
            ["tensor_parallel_size 6", "worker.gpus 4"],
        ),
        ({"ray": {"upgrade": {"type": "Sometimes"}}}, ["ray.upgrade.type"]),
        ({"ray": {"upgrade": {"type": "NewClusterWithIncrementalUpgrade"}}}, ["gatewayClassName"]),
        ({"model": {"cache": {"type": "image"}}}, ["model.cache.image.reference"]),
        ({"model": {"path": ""}}, ["model.path"]),
        ({"image": {"digest": "sha256:12"}}, ["image.digest"]),
        ({"httpRoute": {"enabled": True}}, ["httpRoute.parentRefs"]),
        ({"pools": [{"name": "a", "replicas": {"min": 3, "max": 2}}]}, ["replicas", "3 to 2"]),
        ({"frontend": {"workers": {"min": 3}}}, ["3 to 2"]),
        ({"frontend": {"haproxy": "yes"}}, ["frontend.haproxy"]),
        ({"frontend": {"resources": {"limts": {}}}}, ["limts"]),
        ({"frontend": {"affinity": {"nodeAffinty": {}}}}, ["nodeAffinty"]),
        ({"frontend": {"nodeSelector": {"zone": 1}}}, ["nodeSelector.zone"]),
        ({"frontend": {"topologySpreadConstraints": [{"maxSkew": 1}]}}, ["topologyKey"]),
        ({"pools": [{"name": "a", "worker": {"tolerations": [{"kee": "x"}]}}]}, ["kee"]),
        ({"pools": [{"name": "a", "worker": {"env": [{"name": "A", "value": 1}]}}]}, ["env.0.value"]),
        ({"pools": [{"name": "a", "worker": {"volumes": [{"name": "v", "hostpath": {}}]}}]}, ["hostpath"]),
        ({"ingress": {"hosts": [{"host": "a"}]}}, ["ingress.hosts.0"]),
        ({"networkPolicy": {"clients": [{"podselector": {}}]}}, ["podselector"]),
        ({"image": {"pullSecrets": ["name"]}}, ["image.pullSecrets.0"]),
        ({"service": {"port": 65536}}, ["service.port"]),
        ({"ray": {"upgrade": {"maxSurgePercent": 101}}}, ["maxSurgePercent"]),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ChartError) as refused:
        render(values)
    for word in words:
        assert word in str(refused.value)


def test_the_schema_is_strict_at_every_level() -> None:
    """Every object is closed, or says what is in it; every list says what its items are."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    free = {"podSecurityContext", "containerSecurityContext", "global", "valueFrom"}  # Kubernetes' and Helm's own
    open_ones = []

    def walk(node: Any, path: str) -> None:
        if not isinstance(node, dict):
            return
        if node.get("type") == "object" and "additionalProperties" not in node and path.rpartition(".")[2] not in free:
            open_ones.append(path)
        if node.get("type") == "array" and not node.get("items") and path.rpartition(".")[2] not in ("claims",):
            open_ones.append(path)
        for name, child in node.get("properties", {}).items():
            walk(child, f"{path}.{name}")
        for name, child in node.get("definitions", {}).items():
            walk(child, name)
        for child in [node.get("items"), node.get("additionalProperties"), *node.get("anyOf", [])]:
            walk(child, path)

    walk(schema, "")
    assert open_ones == []


def test_groups_of_pods_are_placed_as_asked() -> None:
    worker = {
        "priorityClassName": "inference",
        "volumes": [{"name": "disk", "hostPath": {"path": "/mnt/nvme"}}],
        "volumeMounts": [{"name": "disk", "mountPath": "/scratch"}],
    }
    objects = render({"pools": [{"name": "a", "worker": worker}], "ray": {"head": {"priorityClassName": "system"}}})
    validate(objects)
    head, frontend, pool = (group["template"]["spec"] for group in groups(objects))
    assert (head["priorityClassName"], pool["priorityClassName"]) == ("system", "inference")
    assert worker["volumes"][0] in pool["volumes"]
    assert worker["volumeMounts"][0] in pool["containers"][0]["volumeMounts"]
    (spread,) = frontend["topologySpreadConstraints"]
    labels = groups(objects)[1]["template"]["metadata"]["labels"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "frontend"
    own = [{**spread, "labelSelector": {"matchLabels": {"a": "b"}}}]
    (kept,) = groups(render({"frontend": {"topologySpreadConstraints": own}}))[1]["template"]["spec"][
        "topologySpreadConstraints"
    ]
    assert kept["labelSelector"] == {"matchLabels": {"a": "b"}}


def test_bundled_redis_makes_way_for_another() -> None:
    ours = {"ray": {"gcsFaultTolerance": {"redisAddress": "redis.db:6379", "passwordSecret": "redis"}}}
    objects = render(ours)
    assert not [name for kind, name in objects if kind == "StatefulSet"]
    options = service(objects)["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "redis.db:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "password"}


def test_alerts_ask_for_metrics_that_exist() -> None:
    labels = {}
    for metric in Metrics().registry:
        for suffix in ("_bucket", "_sum", "_count") if isinstance(metric, Histogram) else ("",):
            labels[f"ray_{metric.name}{suffix}"] = {*metric.labels, "le", "namespace", "release"}
    rules = render(EVERYTHING)[("PrometheusRule", "test-dibit")]["spec"]["groups"][0]["rules"]
    assert len(rules) >= 6
    for rule in rules:
        series = list(selectors(rule["expr"]))
        assert series
        for name, asked in series:
            assert set(asked) <= labels[name], name
            assert (asked["namespace"], asked["release"]) == ("ml", "test")


def test_scrapes_have_the_label_that_alerts_ask_for() -> None:
    objects = render(EVERYTHING)
    (endpoint,) = objects[("PodMonitor", "test-dibit")]["spec"]["podMetricsEndpoints"]
    made = {step["targetLabel"]: step["sourceLabels"] for step in endpoint["relabelings"]}
    assert made["release"] == ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"]
    for group in groups(objects):
        assert group["template"]["metadata"]["labels"]["app.kubernetes.io/instance"] == "test"


def test_the_dashboard_is_in_the_chart() -> None:
    (text,) = render(EVERYTHING)[("ConfigMap", "test-dibit-dashboard")]["data"].values()
    assert json.loads(text)["panels"]
