"""build(args) -> Application: the one ``import_path`` of ``serve_config.yaml``."""

from __future__ import annotations

from typing import Any, cast

from ray.serve import Application, Deployment

from deployments.config import AppConfig
from deployments.ingress import Ingress
from deployments.pool import client_options, engines, scaling, warn_of_missing_resources
from deployments.replica import EngineReplica

TARGET_REQUESTS = 64
"""Requests for each ingress process that Serve aims at when it may add processes. An estimate: so far no more than 32
at once have been measured, on one process."""

IN_ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""Environment in which Serve runs the ingress on the event loop of its HTTP server and of its handles. By default each
has a thread of its own, and every chunk of every answer passes between them; the ingress never blocks its loop."""


def build(args: dict[str, Any]) -> Application:
    """The application for the ``args`` of a ``serve_config.yaml``: the HTTP side, bound to the engines of its pools.

    Raises:
        ConfigError: an option or the model is missing or wrong; the message names it.
        UnsupportedError: what is asked for doesn't exist.
    """
    return application(AppConfig.parse(args))


def application(config: AppConfig, *, replica: type[EngineReplica] = EngineReplica) -> Application:
    """The application for a configuration that was read; a benchmark's own kind of ``replica`` may stand in."""
    for pool in config.pools:
        warn_of_missing_resources(pool)
    ingress = cast(Deployment, Ingress).options(
        max_ongoing_requests=config.ingress.max_ongoing_requests,
        ray_actor_options={
            "num_cpus": config.ingress.num_cpus,
            "resources": config.ingress.resources,
            "label_selector": config.ingress.labels,
            "runtime_env": {"env_vars": IN_ONE_LOOP},
        },
        # An update replaces the engines too: what one of them doesn't finish while it drains is held until there is
        # another, and must not die with its ingress meanwhile. The end of the last request ends the wait.
        graceful_shutdown_timeout_s=config.health.drain_timeout_s + config.failover.hold_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=config.health.check_period_s,
        health_check_timeout_s=config.health.check_timeout_s,
        # An update stops no ingress before its successor is up: it costs next to nothing to have both.
        max_surge_percent=100,
        logging_config={"enable_access_log": False},  # deployments.access has one, which knows keys and tokens
        **scaling(config.ingress.replicas, target_ongoing_requests=TARGET_REQUESTS),
    )
    return ingress.bind(
        {pool.name: engines(config, pool, replica=replica) for pool in config.pools},
        client_options(config),
        access=config.access,
        observability=config.observability,
        tool_call_parser=config.tool_call_parser,
    )
