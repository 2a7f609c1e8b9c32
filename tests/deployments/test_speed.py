from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.config import AutoscalingOptions, ReplicaRange
from deployments.pool import scaling
from deployments.speed import Speed
from engine.messages import EngineLoad

LOAD = EngineLoad(1, 2, 300, 90, 100, steps=10, step_seconds=0.02, busy_seconds=5.0, prefill_tokens=1000)


def test_rates_are_of_the_time_between_two_calls() -> None:
    speed = Speed()
    first = speed.stats(LOAD, now=100.0)
    assert (first["waiting_prefill_tokens"], first["running_requests"], first["free_blocks"]) == (300, 2, 90)
    assert (first["busy"], first["prefill_tokens_per_s"]) == (0, 0)
    later = replace(LOAD, busy_seconds=7.0, prefill_tokens=3000, decode_tokens=100, preemptions=3)
    second = speed.stats(later, now=108.0)
    assert second["busy"] == pytest.approx(0.25)
    assert second["prefill_tokens_per_s"] == pytest.approx(1000)
    assert second["decode_tokens_per_s"] == pytest.approx(50)
    assert second["preemptions"] == 3
    assert all(isinstance(value, int | float) for value in second.values())  # Serve takes nothing else


def test_what_was_turned_away_is_told_once_and_not_before_it_is_a_rate() -> None:
    speed = Speed()
    speed.turned_away(100)
    assert speed.stats(LOAD, now=0.0)["refused_tokens_per_s"] == 0
    speed.turned_away(60)
    second = speed.stats(replace(LOAD, queried_tokens=800, prefill_tokens=1100), now=8.0)
    assert (second["refused_tokens_per_s"], second["begun_tokens_per_s"]) == (20, 100)
    assert speed.stats(LOAD, now=9.0)["refused_tokens_per_s"] == 0


def test_bounds_and_policy_reach_serve() -> None:
    assert scaling(ReplicaRange(min=2, max=2), target_ongoing_requests=8) == {"num_replicas": 2}
    options = AutoscalingOptions(downscale_to_zero_delay_s=7, policy="os.path:join", policy_kwargs={"a": 1})
    config = scaling(ReplicaRange(min=0, max=3, initial=1), target_ongoing_requests=8, options=options)
    autoscaling = config["autoscaling_config"]
    assert (autoscaling.min_replicas, autoscaling.initial_replicas, autoscaling.max_replicas) == (0, 1, 3)
    assert autoscaling.downscale_to_zero_delay_s == 7
    assert autoscaling.policy.policy_function == "os.path:join"
    assert autoscaling.policy.policy_kwargs == {"a": 1}
