"""Two real pools under one policy for the whole application, deployed from a configuration as ``serve run`` does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import TINY, application_args
from crowd import TOKENS, Crowd, pool
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.autoscaling import APPLICATION_POLICY

NAME = "together"


@pytest.fixture
def probe(ray_cluster: object) -> Iterator[Any]:
    """The application, the dearer pool first in its configuration."""
    application = {
        "name": NAME,
        "route_prefix": None,
        "import_path": "conftest:probed",
        "autoscaling_policy": {"policy_function": APPLICATION_POLICY},
        "args": application_args(TINY, [pool("dear", most=1, cost=5.0), pool("cheap", most=1, cost=1.0)]),
    }
    config = ServeDeploySchema.model_validate({"applications": [application]})
    try:
        # What `serve run` and KubeRay give Serve; there is no public function for it.
        _get_global_client().deploy_apps(config, _blocking=True)
        yield serve.get_app_handle(NAME)
    finally:
        serve.delete(NAME)


def running() -> set[str]:
    """Pools that have an engine which is not about to go."""
    deployments = serve.status().applications[NAME].deployments
    return {
        name.removeprefix("EngineReplica-")
        for name, deployment in deployments.items()
        if name != "Probe" and deployment.replica_states.get("RUNNING", 0)
    }


def test_the_cheaper_pool_comes_first_and_the_dearer_goes_first(probe: Any) -> None:
    assert probe.loads.remote().result(timeout_s=60) == []
    with Crowd(probe) as crowd:
        probe.until_engines.remote(1).result(timeout_s=240)
        assert running() == {"cheap"}
        probe.until_engines.remote(2).result(timeout_s=240)
        assert running() == {"cheap", "dear"}
        crowd.leave(stay=1)
        probe.until_engines.remote(1).result(timeout_s=240)
        assert running() == {"cheap"}
    probe.until_engines.remote(0).result(timeout_s=240)
    assert set(crowd.answers) == {TOKENS}
