"""Two real pools under one policy for the whole application, deployed from a configuration as ``serve run`` does it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import TINY, application_args
from probe import greedy
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.autoscaling import APPLICATION_POLICY

NAME = "together"
TOKENS = 150
CLIENTS = 12
AUTOSCALING = {
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 2.0,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2.0,
    "start_s": 5.0,
}


def pool(name: str, cost: float) -> dict[str, Any]:
    return {
        "name": name,
        "engine": {"max_num_seqs": 4},  # so that a dozen clients are more than one engine takes
        "replicas": {"min": 0, "max": 1},
        "autoscaling": {**AUTOSCALING, "cost": cost},
    }


@pytest.fixture
def probe(ray_cluster: object) -> Iterator[Any]:
    """The application, the dearer pool first in its configuration."""
    application = {
        "name": NAME,
        "route_prefix": None,
        "import_path": "conftest:probed",
        "autoscaling_policy": {"policy_function": APPLICATION_POLICY},
        "args": application_args(TINY, [pool("dear", 5.0), pool("cheap", 1.0)]),
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
    answers: list[int] = []
    most, all_of_them = threading.Event(), threading.Event()

    def ask(client: int) -> None:
        enough = all_of_them if client == 0 else most
        number = 0
        while not enough.is_set():
            number += 1
            request = greedy(f"client-{client}-{number}", [1 + client, 2, 3], TOKENS)
            token_ids, _ = probe.generate.remote(request).result(timeout_s=240)
            answers.append(len(token_ids))

    assert probe.loads.remote().result(timeout_s=60) == []
    clients = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        probe.until_engines.remote(1).result(timeout_s=240)
        assert running() == {"cheap"}
        probe.until_engines.remote(2).result(timeout_s=240)
        assert running() == {"cheap", "dear"}
        most.set()
        probe.until_engines.remote(1).result(timeout_s=240)
        assert running() == {"cheap"}
    finally:
        most.set()
        all_of_them.set()
        for client in clients:
            client.join()
    probe.until_engines.remote(0).result(timeout_s=240)
    assert set(answers) == {TOKENS}
