"""The chart, the image and the application agree on ports, names and paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from rendering import CHART, render, serve_config, service

from deployments.access.config import AccessConfig
from deployments.app import build

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
    assert url == f"http://{name}:80/v1/completions"


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
    (workdir,) = [value for value in step("WORKDIR") if value != "/src"]
    copied = [value.split()[-1] for value in step("COPY") if "examples" in value]
    assert application["args"]["model"] in [f"{workdir}/{target}" for target in copied]


@pytest.mark.parametrize("preset", [None, "values-cpu-demo.yaml"])
def test_pods_run_as_the_user_of_the_image(preset: str | None) -> None:
    spec = service(render(preset=preset))["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    context = spec["securityContext"]
    assert step("USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    (container,) = spec["containers"]
    (home,) = [variable["value"] for variable in container["env"] if variable["name"] == "HOME"]
    assert f"--create-home {Path(home).name}" in " ".join(step("RUN"))
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {home, "/tmp"} <= writable  # the root file system is read-only
