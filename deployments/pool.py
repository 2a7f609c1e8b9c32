"""The Serve deployment of one pool: an EngineReplica for each engine, with the resources it asks for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from deployments.config import AppConfig, PoolConfig, ReplicaRange
from deployments.placement import REPLICA_CPUS, bundles, missing, strategy
from deployments.progress import log_to_stderr
from deployments.replica import EngineReplica

logger = logging.getLogger("deployments.pool")

UNBOUNDED = 1_000_000
"""Ongoing leases of a replica. How many requests run at once is the engine scheduler's decision, not Serve's."""

CONSTRUCTOR_ATTEMPTS = 1
"""A first start that fails is reported, not repeated: what a user got wrong would go wrong again, after minutes of
loading (EngineReplica itself retries what is worth it). Replicas that were up once are always replaced."""


def engines(config: AppConfig, pool: PoolConfig) -> Application:
    """The deployment of one pool, bound to its options; ``config.model`` is an absolute path."""
    engine = config.engine_config(pool)
    # The model's own date, because a value that changed with each build would make Serve restart every replica.
    created = int((Path(config.model) / "config.json").stat().st_mtime)
    configured = serve.deployment(
        name=f"EngineReplica-{pool.name}",
        **scaling(pool.replicas, target_ongoing_requests=engine.max_num_seqs / 2),
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        health_check_period_s=config.health.check_period_s,
        health_check_timeout_s=config.health.check_timeout_s,
        graceful_shutdown_timeout_s=config.health.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=bundles(pool),
        placement_group_strategy=strategy(pool),
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.lease_router.LeaseRouter"  # type: ignore[arg-type]  # as documented
        ),
        logging_config={"enable_access_log": False},  # each lease would be a line
    )
    deployment: Deployment = configured(EngineReplica)
    application: Application = deployment.bind(
        engine,
        pool,
        served_model_name=config.served_model_name,
        created=created,
        stalled_after_s=config.health.stalled_after_s,
    )
    return application


def scaling(replicas: ReplicaRange, *, target_ongoing_requests: float) -> dict[str, Any]:
    """Deployment options for a number of replicas; between bounds, Serve aims at so many requests on each."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min, max_replicas=replicas.max, target_ongoing_requests=target_ongoing_requests
        )
    }


def warn_of_missing_resources(pool: PoolConfig) -> None:
    """Warn at once where Serve would wait in silence for resources. Not an error: nodes may be on their way."""
    if not ray.is_initialized():
        return
    lacking = missing(pool, ray.cluster_resources())  # type: ignore[no-untyped-call]  # Ray's
    if lacking:
        log_to_stderr()
        logger.warning("%s; waiting until such nodes join", lacking)
