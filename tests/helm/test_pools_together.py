"""One policy for all pools, where there are several to scale; Serve finds it under the name that the chart gives."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema
from rendering import ChartError, render, serve_config

from deployments.autoscaling import APPLICATION_POLICY

ROOM = {"min": 0, "max": 2}


def policy(replicas: list[Any], **values: Any) -> str | None:
    """The policy of the application, with pools of so many replicas."""
    pools = [{"name": f"pool-{i}", "accelerator_type": "H20", "replicas": r} for i, r in enumerate(replicas)]
    config = ServeDeploySchema.model_validate(serve_config(render({"pools": pools, **values})))
    (application,) = config.applications
    return None if application.autoscaling_policy is None else application.autoscaling_policy["policy_function"]


@pytest.mark.parametrize(
    ("replicas", "together", "planned"),
    [
        ([ROOM], "auto", False),
        ([ROOM, ROOM], "auto", True),
        ([ROOM, 2], "auto", False),
        ([ROOM, {"min": 2, "max": 2}], "auto", False),
        ([{"max": 3}, ROOM, 1], "auto", True),
        ([ROOM, ROOM], "never", False),
        ([ROOM], "always", True),
    ],
)
def test_pools_are_planned_together_where_there_are_several(replicas: list[Any], together: str, planned: bool) -> None:
    assert policy(replicas, autoscaling={"together": together}) == (APPLICATION_POLICY if planned else None)


def test_the_preset_with_two_pools_plans_them_together() -> None:
    (application,) = serve_config(render(preset="values-h20-a100-pools.yaml"))["applications"]
    assert application["autoscaling_policy"] == {"policy_function": APPLICATION_POLICY}


def test_another_word_is_refused() -> None:
    with pytest.raises(ChartError, match="together"):
        render({"autoscaling": {"together": "sometimes"}})
