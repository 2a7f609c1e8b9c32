"""What Serve hands to the policies, and that they work in its controller."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config, _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.autoscaling import ApplicationPolicy, PoolPolicy
from deployments.config import AppConfig
from deployments.pool import plan_options, scaling
from deployments.speed import Speed
from engine.messages import EngineLoad

BUSY = [
    EngineLoad(0, 8, 0, 90, 100, steps=0, step_seconds=0.0),
    EngineLoad(
        20, 8, 9000, 40, 100, steps=800, step_seconds=0.01, busy_seconds=9.5, prefill_tokens=8000, decode_tokens=900
    ),
]


def context(
    name: str, *, target: int, replicas: int, config: Any = None, requests: float = 0.0, now: float = 0.0
) -> Any:
    """As Serve's controller makes it, of replicas that have recorded BUSY."""
    deployment = DeploymentID(name=name, app_name="app")
    ids = [ReplicaID(f"{name}-{i}", deployment) for i in range(replicas)]
    speed = Speed()
    recorded = [speed.stats(load, now=10.0 * i) for i, load in enumerate(BUSY)]
    raw = {
        key: {replica: [TimeStampedValue(10.0 * i, stats[key]) for i, stats in enumerate(recorded)] for replica in ids}
        for key in recorded[0]
    }
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name=name,
        app_name="app",
        current_num_replicas=replicas,
        target_num_replicas=target,
        running_replicas=ids,
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=raw if replicas else {},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=config,
    )


def decide(policy: Any, make: Any, *, ticks: int) -> Any:
    """Ask again and again with the state that came back, as Serve does."""
    state: Any = {}
    for tick in range(ticks):
        given = make(float(tick))
        if isinstance(given, dict):
            for deployment, ctx in given.items():
                ctx.policy_state = state.get(deployment, {})
        else:
            given.policy_state = state
        count, state = policy(given)
    return count


def test_an_overloaded_replica_gets_another_one() -> None:
    policy = _apply_autoscaling_config(PoolPolicy(pool="a", max_num_seqs=64))
    config = AutoscalingConfig(min_replicas=0, max_replicas=4, upscale_delay_s=0, downscale_delay_s=0)
    assert decide(policy, lambda now: context("a", target=1, replicas=1, config=config, now=now), ticks=30) == 2


def test_all_pools_of_an_application_are_planned_together() -> None:
    """The dear pool is overloaded, the cheap one has nothing: what comes is cheap. The ingress is not a pool."""

    def config(pool: str, cost: float) -> AutoscalingConfig:
        return AutoscalingConfig(
            min_replicas=0, max_replicas=4, upscale_delay_s=0, downscale_delay_s=0,
            policy=AutoscalingPolicy(
                policy_function="deployments.autoscaling:PoolPolicy",
                policy_kwargs={"pool": pool, "cost": cost, "max_num_seqs": 64, "start_s": 1000},
            ),
        )  # fmt: skip

    configs = {"dear": config("dear", 4.0), "cheap": config("cheap", 1.0)}
    ingress = AutoscalingConfig(
        min_replicas=1, max_replicas=9, target_ongoing_requests=10, upscale_delay_s=0, downscale_delay_s=0
    )

    def contexts(now: float) -> dict[DeploymentID, Any]:
        made = [
            context("dear", target=1, replicas=1, config=configs["dear"], now=now),
            context("cheap", target=0, replicas=0, config=configs["cheap"], now=now),
            context("Ingress", target=1, replicas=1, config=ingress, requests=35, now=now),
        ]
        return {ctx.deployment_id: ctx for ctx in made}

    policy = _apply_app_level_autoscaling_config(ApplicationPolicy())
    targets = {deployment.name: count for deployment, count in decide(policy, contexts, ticks=30).items()}
    assert targets["cheap"] > 0
    assert targets["dear"] == 1
    assert targets["Ingress"] == 4


@pytest.mark.parametrize("name", ["PoolPolicy", "ApplicationPolicy"])
def test_a_controller_needs_nothing_of_this_project(name: str, tmp_path: Path) -> None:
    """An application may be built elsewhere than where Serve's controller runs, with other packages."""
    policy = AutoscalingPolicy(policy_function=f"deployments.autoscaling:{name}")
    file = tmp_path / "policy"
    file.write_bytes(policy.get_serialized_policy_def())
    lines = [
        "import sys",
        "sys.modules['deployments'] = sys.modules['engine'] = None",
        "from ray import cloudpickle",
        f"policy = cloudpickle.loads(open({str(file)!r}, 'rb').read())",
        "print(policy(pool='a')._options if policy.__name__ == 'PoolPolicy' else policy()({}))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("PoolOptions(pool='a'", "({}, {})"))


def test_pools_with_room_are_planned_by_default() -> None:
    args = {
        "model": "examples/ernie-tiny/bf16",
        "engine": {"max_num_seqs": 24, "block_size": 32},
        "routing": {"slo_tpot_s": 0.1},
        "pools": [
            {"name": "two", "tensor_parallel_size": 2, "replicas": {"min": 0, "max": 3}, "autoscaling": {"start_s": 9}}
        ],
    }
    config = AppConfig.parse(args)
    pool = config.pools[0]
    made = scaling(
        pool.replicas, target_ongoing_requests=1, options=pool.autoscaling, planned=plan_options(config, pool)
    )["autoscaling_config"]
    options = PoolPolicy(**made.policy.policy_kwargs)._options
    assert (options.cost, options.max_num_seqs, options.block_size) == (2, 24, 32)
    assert (options.slo_tpot_s, options.start_s, options.downscale_delay_s) == (0.1, 9, 300)
    assert (made.upscale_delay_s, made.downscale_delay_s, made.downscale_to_zero_delay_s) == (0, 0, 0)
