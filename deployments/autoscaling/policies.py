"""The policies that Serve's controller calls, for one pool or for an application; they only translate.

Serve calls them about ten times a second. Around each it puts rules of its own
(``ray.serve.autoscaling_policy._apply_autoscaling_config``): a deployment without replicas that has requests gets one,
whatever its policy says, and delays, which are set to 0 as :func:`plan` has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from deployments.autoscaling.planning import plan
from deployments.autoscaling.state import Memory, PoolOptions, PoolState, ReplicaStats

MEMORY = "memory"


class PoolPolicy:
    """``AutoscalingConfig.policy`` of one pool, which is looked after for itself. Takes the fields of PoolOptions."""

    def __init__(self, **options: Any) -> None:
        """Made by Serve's controller with the ``policy_kwargs``."""
        self._options = PoolOptions(**options)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The replicas that the pool should have, and the state to come back with next time."""
        memory = context.policy_state.get(MEMORY, Memory())
        pool = pool_state(context, self._options)
        targets, memory = plan([pool], memory, now=_now(context))
        return targets[self._options.pool], {MEMORY: memory}


class ApplicationPolicy:
    """``autoscaling_policy`` of an application in ``serve_config.yaml``: all of its pools at once, cheaper ones first.

    A pool is a deployment whose own policy is given PoolOptions; of these everything is read. Others, such as the
    ingress, are scaled by Serve's default policy.
    """

    def __call__(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Replicas and state by deployment id."""
        pools: dict[Any, PoolState] = {}
        targets: dict[Any, int] = {}
        states: dict[Any, dict[str, Any]] = {}
        memory = Memory()
        for deployment, context in contexts.items():
            kwargs = context.config.policy.policy_kwargs if context.config is not None else {}
            if "pool" in kwargs:
                pools[deployment] = pool_state(context, PoolOptions(**kwargs))
                memory = context.policy_state.get(MEMORY, memory)
            else:
                count, state = replica_queue_length_autoscaling_policy(context)
                targets[deployment], states[deployment] = count, state  # type: ignore[assignment]  # Serve rounds it up
        if pools:
            planned, memory = plan(list(pools.values()), memory, now=_now(next(iter(contexts.values()))))
            for deployment, pool in pools.items():
                targets[deployment] = planned[pool.options.pool]
                states[deployment] = {MEMORY: memory}
        return targets, states


def pool_state(context: AutoscalingContext, options: PoolOptions) -> PoolState:
    """A pool as Serve sees it: its own bounds and target, and the stats that its replicas have recorded."""
    options = replace(
        options,
        min_replicas=context.capacity_adjusted_min_replicas,
        max_replicas=context.capacity_adjusted_max_replicas,
    )
    metrics = context.raw_metrics or {}
    return PoolState(
        options=options,
        target=context.target_num_replicas,
        replicas={replica.unique_id: _stats(replica, metrics) for replica in context.running_replicas},
        requests=context.total_num_requests,
    )


def _stats(replica: Any, metrics: Mapping[str, Mapping[Any, Any]]) -> ReplicaStats | None:
    """All metrics of a replica are recorded together, so that their series match, counted from the end."""
    series = {name: by_replica[replica] for name, by_replica in metrics.items() if by_replica.get(replica)}
    if not series:
        return None
    count = min(map(len, series.values()))
    return ReplicaStats.of([{name: points[i - count].value for name, points in series.items()} for i in range(count)])


def _now(context: AutoscalingContext) -> float:
    if context.current_time is None:
        raise ValueError("Serve gave its autoscaling policy no time")
    return context.current_time
