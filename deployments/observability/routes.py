"""The endpoints by which an application is seen: ``/metrics``, ``/state`` and the page at ``/``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from deployments.observability import exposition
from deployments.observability.config import ObservabilityConfig
from deployments.observability.experts import ExpertLoads
from deployments.observability.metrics import Metrics
from deployments.observability.state import StateEncoder, StateSource
from deployments.page import page_routes

NO_STORE = {"cache-control": "no-store"}


def observability_routes(
    source: StateSource,
    metrics: Metrics,
    config: ObservabilityConfig,
    *,
    pools: Sequence[str] = (),
    experts: ExpertLoads | None = None,
) -> list[BaseRoute]:
    """The endpoints that the configuration asks for.

    Args:
        source: the engines.
        metrics: the observer that counts what happens to them.
        config: which endpoints there are.
        pools: names of the configured pools; the page shows them also while they have no replica.
        experts: tokens of each expert.
    """
    encode = StateEncoder(
        source,
        ingress=metrics.registry.constant.get("ingress", ""),
        latencies={"ttft": metrics.ttft, "tpot": metrics.tpot, "queue": metrics.queue_time},
        pools=pools,
        experts=None if experts is None else lambda: experts.pools,
    )

    async def show_metrics(_: Request) -> Response:
        metrics.collect()
        parts = []
        for part in exposition.render(metrics.registry):
            parts.append(part)
            await asyncio.sleep(0)
        return Response(b"".join(parts), headers={**NO_STORE, "content-type": exposition.CONTENT_TYPE})

    async def show_state(request: Request) -> Response:
        body = encode(experts=request.query_params.get("experts") == "1")
        return Response(body, media_type="application/json", headers=NO_STORE)

    routes: list[BaseRoute] = []
    if config.metrics:
        routes.append(Route("/metrics", show_metrics))
    if config.state:
        routes.append(Route("/state", show_state))
    if config.page:
        routes += page_routes()
    return routes
