"""The chart, the image and the application agree on ports, names and paths."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.version import Version
from rendering import CHART, ChartError, render, serve_config, service

from deployments.access.config import AccessConfig
from deployments.app import build
from deployments.config import PoolConfig
from deployments.placement import bundles, total

ROOT = CHART.parents[1]
STEPS = DockerfileParser(path=str(ROOT)).structure


def step(instruction: str) -> list[str]:
    return [found["value"] for found in STEPS if found["instruction"] == instruction]


def test_the_import_path_is_the_builder() -> None:
    (application,) = serve_config(render())["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"


def test_the_http_port_is_one() -> None:
    objects = render({"ingress": {"enabled": True}})
    port = serve_config(objects)["http_options"]["port"]
    spec = service(objects)
    assert [entry["targetPort"] for entry in spec["serveService"]["spec"]["ports"]] == [port]
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "serve", "containerPort": port} in container["ports"]
    policy = objects[("NetworkPolicy", "test-dibit")]
    assert {"port": port, "protocol": "TCP"} in policy["spec"]["ingress"][1]["ports"]
    assert step("EXPOSE") == [str(port)]
    assert yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))["http_options"]["port"] == port


def test_the_service_has_the_name_that_others_use() -> None:
    objects = render({"ingress": {"enabled": True}})
    name = service(objects)["serveService"]["metadata"]["name"]
    (path,) = objects[("Ingress", name)]["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"] == {"name": name, "port": {"name": "serve"}}
    (container,) = objects[("Pod", f"{name}-test")]["spec"]["containers"]
    (url,) = [variable["value"] for variable in container["env"] if variable["name"] == "URL"]
    assert url == f"http://{name}:80"


def test_keys_are_where_the_application_looks() -> None:
    objects = render({"apiKeys": {"secret": "keys"}})
    (application,) = serve_config(objects)["applications"]
    access = AccessConfig.model_validate(application["args"]["access"])
    assert access.keys_file is not None
    for group in service(objects)["rayClusterConfig"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert Path(access.keys_file).parent.as_posix() == mounts["api-keys"]


def test_the_demo_serves_the_model_that_is_in_the_image() -> None:
    (application,) = serve_config(render(preset="values-cpu-demo.yaml"))["applications"]
    workdir, copied = "", []
    for found in STEPS:
        if found["instruction"] == "WORKDIR":
            workdir = found["value"]
        elif found["instruction"] == "COPY" and "examples" in found["value"]:
            copied.append(f"{workdir}/{found['value'].split()[-1]}")
    assert application["args"]["model"] in copied


@pytest.mark.parametrize("preset", [None, "values-cpu-demo.yaml"])
def test_pods_run_as_the_user_of_the_image(preset: str | None) -> None:
    spec = service(render(preset=preset))["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    context = spec["securityContext"]
    assert set(step("USER")) == {f"{context['runAsUser']}:{context['runAsGroup']}"}
    (container,) = spec["containers"]
    (home,) = [variable["value"] for variable in container["env"] if variable["name"] == "HOME"]
    assert f"--create-home {Path(home).name}" in " ".join(step("RUN"))
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {home, "/tmp"} <= writable  # the root file system is read-only


def test_the_image_has_what_kuberays_probes_run() -> None:
    """`bash -c "wget ... | grep success"`, for a worker's readiness (BaseWgetHealthCommand, utils/constant.go)."""
    assert any("apt-get install" in value and " wget" in value for value in step("RUN"))


def test_ray_is_the_one_that_is_installed_and_asked_for() -> None:
    version = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["ray"]["version"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (asked,) = [found for found in map(Requirement, extras["serve"]) if found.name == "ray"]
    assert version in asked.specifier
    assert Version(version).release[:2] == Version(ray.__version__).release[:2]  # what the tests run with
    assert service(render())["rayClusterConfig"]["rayVersion"] == version


@pytest.mark.parametrize(
    ("pool", "gpus", "cpus"),
    [
        ({"accelerator_type": "H20", "tensor_parallel_size": 4}, 8, 8.2),
        ({"accelerator_type": "H20", "tensor_parallel_size": 8, "num_cpus": 2}, 8, 16.1),
        ({"tensor_parallel_size": 8}, 8, 2.1),
    ],
)
def test_the_cpus_of_a_pod_hold_what_its_engines_ask_for(pool: dict[str, Any], gpus: int, cpus: float) -> None:
    """The chart refuses exactly the pods in which the application's own bundles have no room."""
    config = PoolConfig.model_validate({"name": "p", **pool})
    bundled = total(bundles(config) * (gpus // config.tensor_parallel_size))
    assert bundled["CPU"] == pytest.approx(cpus)

    def worker(**resources: Any) -> dict[str, Any]:
        own = {"gpus": gpus} if config.accelerator_type else {}
        return {"pools": [{"name": "p", **pool, "worker": {**own, "resources": resources}}]}

    enough = math.ceil(cpus)
    for amount in (str(enough), f"{enough * 1000}m"):
        render(worker(requests={"cpu": amount}))
    for few in ({"cpu": f"{enough - 1}"}, {"cpu": f"{enough * 1000 - 1500}m"}):
        with pytest.raises(ChartError, match=r"pools\.p: Ray has"):
            render(worker(requests={"cpu": "64"}, limits=few))
