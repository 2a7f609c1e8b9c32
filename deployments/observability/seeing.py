"""Everything by which one ingress process is seen, from its configuration to its last flush."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import ray
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from deployments.observability.config import ObservabilityConfig, TracingConfig
from deployments.observability.experts import ExpertLoads
from deployments.observability.metrics import Metrics
from deployments.observability.ray_export import RayExport
from deployments.observability.routes import observability_routes
from deployments.observability.state import StateSource, word
from deployments.observer import Observer, Observers
from engine.errors import ConfigError

if TYPE_CHECKING:
    from deployments.observability.tracing import Tracing

logger = logging.getLogger(__name__)

FLUSH_S = 1.0


class Seeing:
    """Metrics, traces, state and page of one ingress process.

    In this order: :attr:`observer` goes to the client of the engines, :meth:`start` when that has started,
    :meth:`routes` and :meth:`around` into the application, :meth:`close` at its end.

    Args:
        config: what is asked for.
        application: Serve's name of the application.
        ingress: name of this process.
        pools: names of the configured pools.

    Raises:
        ConfigError: traces are asked for, and what makes them is not installed.
    """

    def __init__(
        self, config: ObservabilityConfig, *, application: str, ingress: str, pools: Sequence[str] = ()
    ) -> None:
        self._config = config
        self._pools = tuple(pools)
        self.metrics = Metrics(application=application, ingress=ingress)
        self._experts = ExpertLoads()
        self._tracing = open_tracing(config.tracing, application=application)
        self._task: asyncio.Task[None] | None = None

    @property
    def observer(self) -> Observer:
        """Hears what happens to requests and engines."""
        return self.metrics if self._tracing is None else Observers([self.metrics, self._tracing])

    def start(self, source: StateSource) -> None:
        """Begin to flush once a second, and to ask the engines for the load of their experts."""
        self._task = asyncio.get_running_loop().create_task(self._run(source))

    def routes(self, source: StateSource) -> list[BaseRoute]:
        """The endpoints that the configuration asks for."""
        return observability_routes(source, self.metrics, self._config, pools=self._pools, experts=self._experts)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application itself, or with spans around its requests."""
        return app if self._tracing is None else self._tracing.around(app)

    async def close(self) -> None:
        """Stop flushing, and send the traces that are left."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._tracing is not None:
            await self._tracing.close()

    async def _run(self, source: StateSource) -> None:
        export = RayExport(self.metrics.registry) if self._config.metrics and ray.is_initialized() else None
        asked = float("-inf")
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                if time.monotonic() - asked >= self._config.expert_load_period_s:
                    asked = time.monotonic()
                    await self._ask_experts(source)
                count_engines(source, self.metrics)
                self.metrics.collect()
                if export is not None:
                    for _ in export.flush():
                        await asyncio.sleep(0)
            except Exception:  # what goes wrong once must not end the numbers for good
                logger.exception("the metrics could not be brought up to date")

    async def _ask_experts(self, source: StateSource) -> None:
        await self._experts.poll([engine.address for engine in source.engines() if engine.ready])
        for pool, layers in self._experts.pools.items():
            self.metrics.note_experts(pool, layers)


def count_engines(source: StateSource, metrics: Metrics) -> None:
    """Count the engines by pool and state, and the requests that wait for one."""
    metrics.count_engines(Counter((engine.address.pool, word(engine)) for engine in source.engines()))
    metrics.held.set((), source.held)


def open_tracing(config: TracingConfig, *, application: str) -> Tracing | None:
    """What makes traces, or None where none are asked for; then nothing of OpenTelemetry is imported.

    Raises:
        ConfigError: it is not installed.
    """
    if config.endpoint is None:
        return None
    try:
        from deployments.observability.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            f"observability.tracing.endpoint is set, but {error.name or 'OpenTelemetry'} is not installed; "
            "run: pip install 'dibit[tracing]', or remove the endpoint"
        ) from None
    return Tracing(config, application=application)
