"""build(args) -> Application: the one ``import_path`` of ``serve_config.yaml``."""

from __future__ import annotations

from typing import Any, cast

from ray.serve import Application, Deployment

from deployments.config import AppConfig
from deployments.ingress import Ingress
from deployments.pool import engines, scaling, warn_of_missing_resources

TARGET_REQUESTS = 64
"""Requests for each ingress process that Serve aims at when it may add processes. An estimate: so far no more than 32
at once have been measured, on one process."""


def build(args: dict[str, Any]) -> Application:
    """The application for the ``args`` of a ``serve_config.yaml``: the HTTP side, bound to the engines of its pool.

    Raises:
        ConfigError: an option or the model is missing or wrong; the message names it.
        UnsupportedError: what is asked for doesn't exist.
    """
    config = AppConfig.parse(args)
    pool = config.pools[0]
    warn_of_missing_resources(pool)
    ingress = cast(Deployment, Ingress).options(
        max_ongoing_requests=config.ingress.max_ongoing_requests,
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        **scaling(config.ingress.replicas, target_ongoing_requests=TARGET_REQUESTS),
    )
    return ingress.bind(engines(config, pool))
