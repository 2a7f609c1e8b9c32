"""The Serve deployment of one pool: an EngineReplica for each engine, with the resources it asks for."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from deployments.client import ClientOptions
from deployments.config import AppConfig, AutoscalingOptions, PoolConfig, ReplicaRange
from deployments.directory import ModelInfo, PoolInfo
from deployments.identity import ModelIdentity
from deployments.placement import REPLICA_CPUS, bundles, label_selector, missing, strategy
from deployments.progress import log_to_stderr
from deployments.replica import EngineReplica
from engine.checkpoint.hub import resolve_model

logger = logging.getLogger("deployments.pool")

POLICY = "deployments.autoscaling:PoolPolicy"

UNBOUNDED = 1_000_000
"""Ongoing leases of a replica. How many requests run at once is the engine scheduler's decision, not Serve's."""

CONSTRUCTOR_ATTEMPTS = 1
"""A first start that fails is reported, not repeated: what a user got wrong would go wrong again, after minutes of
loading (EngineReplica itself retries what is worth it). Replicas that were up once are always replaced."""


def deployment_name(pool: PoolConfig) -> str:
    """What Serve's tab of the dashboard shows."""
    return f"EngineReplica-{pool.name}"


def engines(config: AppConfig, pool: PoolConfig, *, replica: type[EngineReplica] = EngineReplica) -> Application:
    """The deployment of one pool, bound to its options; models are absolute paths or repositories."""
    engine = config.engine_config(pool)
    target = pool.autoscaling.target_ongoing_requests or engine.max_num_seqs / 2
    configured = serve.deployment(
        name=deployment_name(pool),
        **scaling(
            pool.replicas,
            target_ongoing_requests=target,
            options=pool.autoscaling,
            planned=plan_options(config, pool),
        ),
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        health_check_period_s=config.health.check_period_s,
        health_check_timeout_s=config.health.check_timeout_s,
        graceful_shutdown_timeout_s=config.health.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=bundles(pool),
        placement_group_strategy=strategy(pool, _nodes()),
        placement_group_bundle_label_selector=label_selector(pool),  # type: ignore[arg-type]  # None is the default
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.lease_router.LeaseRouter"  # type: ignore[arg-type]  # as documented
        ),
        logging_config={"enable_access_log": False},  # each lease would be a line
    )
    deployment: Deployment = configured(replica)
    application: Application = deployment.bind(
        engine,
        # What may change without a new engine is left out, as Serve restarts replicas whose arguments have changed.
        pool.model_copy(update={"replicas": ReplicaRange(max=1), "autoscaling": AutoscalingOptions()}),
        served_model_name=config.served_model_name,
        stalled_after_s=config.health.stalled_after_s,
    )
    return application


def client_options(config: AppConfig) -> ClientOptions:
    """What the ingress is told of the application's pools."""
    folder = resolve_model(config.model, weights=False)
    pools = tuple(
        PoolInfo(name=pool.name, max_model_len=config.max_model_len(pool), on_demand=pool.replicas.min == 0)
        for pool in sorted(config.pools, key=lambda pool: pool.cost)
    )
    return ClientOptions(
        info=ModelInfo(
            model_path=config.model,
            served_model_name=config.served_model_name,
            max_model_len=max(pool.max_model_len for pool in pools),
            # The model's own date, because a value that changed with each build would make Serve restart the ingress.
            created=int((folder / "config.json").stat().st_mtime),
        ),
        identity=ModelIdentity.of_folder(folder).digest,
        pools=pools,
        routing=config.routing,
        failover=config.failover,
    )


def plan_options(config: AppConfig, pool: PoolConfig) -> dict[str, Any]:
    """What :class:`deployments.autoscaling.PoolPolicy` is told of a pool, besides its bounds."""
    engine, options = config.engine_config(pool), pool.autoscaling
    return {
        "pool": pool.name,
        "cost": pool.cost,
        "max_num_seqs": engine.max_num_seqs,
        "block_size": engine.block_size,
        "slo_ttft_s": config.routing.slo_ttft_s,
        "slo_tpot_s": config.routing.slo_tpot_s,
        "target_utilization": options.target_utilization,
        "upscale_delay_s": options.upscale_delay_s,
        "downscale_delay_s": options.downscale_delay_s,
        "downscale_to_zero_delay_s": options.downscale_to_zero_delay_s,
        "start_s": options.start_s,
    }


def scaling(
    replicas: ReplicaRange,
    *,
    target_ongoing_requests: float,
    options: AutoscalingOptions | None = None,
    planned: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Deployment options for a number of replicas.

    Between bounds, the policy that the options name decides; without one, the plan of ``deployments.autoscaling`` where
    there is one, or else Serve, which aims at so many requests on each.
    """
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    options = options or AutoscalingOptions()
    config = AutoscalingConfig(
        min_replicas=replicas.min,
        max_replicas=replicas.max,
        initial_replicas=replicas.initial,
        target_ongoing_requests=target_ongoing_requests,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        downscale_to_zero_delay_s=options.downscale_to_zero_delay_s,
        look_back_period_s=options.look_back_period_s,
        metrics_interval_s=options.metrics_interval_s,
    )
    if options.policy is not None:
        policy = AutoscalingPolicy(policy_function=options.policy, policy_kwargs=options.policy_kwargs)  # type: ignore[no-untyped-call]  # Ray's
        config = config.model_copy(update={"policy": policy})
    elif planned is not None:
        policy = AutoscalingPolicy(policy_function=POLICY, policy_kwargs=planned)  # type: ignore[no-untyped-call]  # Ray's
        # The plan has delays of its own; Serve's would come on top of them.
        none = {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}
        config = config.model_copy(update={"policy": policy, **none})
    return {"autoscaling_config": config}


def _nodes() -> list[dict[str, float]]:
    """The resources of each living node; none where no cluster is at hand."""
    if not ray.is_initialized():
        return []
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray's


def warn_of_missing_resources(pool: PoolConfig) -> None:
    """Warn at once where Serve would wait in silence for resources. Not an error: nodes may be on their way."""
    if not ray.is_initialized():
        return
    lacking = missing(pool, ray.cluster_resources())  # type: ignore[no-untyped-call]  # Ray's
    if lacking:
        log_to_stderr()
        logger.warning("%s; waiting until such nodes join", lacking)
