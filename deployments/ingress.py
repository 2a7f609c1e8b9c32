"""The HTTP face of an application: one Serve deployment that hosts the OpenAI endpoints."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.access.config import AccessConfig
from deployments.announce import announce
from deployments.client import ClientOptions, EngineClient
from deployments.observability.config import ObservabilityConfig
from deployments.observability.seeing import Seeing
from deployments.openai.app import create_app
from deployments.page import PAGE_PATHS
from engine.checkpoint.hub import resolve_model
from engine.sampling_params import default_sampling
from engine.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")


@serve.deployment(name="Ingress", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Ingress:
    """Tokenizes, submits to the engines, turns tokens into text and server-sent events.

    Admission is the engine scheduler's business, so Serve's own limit on ongoing requests is out of the way.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        pools: dict[str, DeploymentHandle[Any]],
        options: ClientOptions,
        *,
        access: AccessConfig,
        observability: ObservabilityConfig,
        tool_call_parser: str | None = None,
    ) -> None:
        """Load the tokenizer, and wait for the first engine if there has to be one.

        Args:
            pools: handles of the pools' deployments by name, bound by :func:`deployments.app.build`.
            options: what is served, and how.
            access: keys, limits and logs.
            observability: metrics, page and traces.
            tool_call_parser: how the model writes tool calls, where its chat template doesn't tell.
        """
        folder = await asyncio.to_thread(resolve_model, options.info.model_path, weights=False)
        self._tokenizer = Tokenizer.from_folder(folder)
        self._sampling_defaults = default_sampling(folder)
        self._access = access
        self._tool_call_parser = tool_call_parser
        context = serve.get_replica_context()
        self._seeing = Seeing(
            observability,
            application=context.app_name,
            ingress=context.replica_id.unique_id,
            pools=list(pools),
        )
        self._client = EngineClient(pools, options, observer=self._seeing.observer)
        await self._client.start()
        self._seeing.start(self._client)
        await self._announce()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Make the ASGI app; Serve calls this once, after the constructor, and runs its lifespan."""
        app = create_app(
            self._client,
            tokenizer=self._tokenizer,
            access=self._access,
            sampling_defaults=self._sampling_defaults,
            tool_call_parser=self._tool_call_parser,
            routes=self._seeing.routes(self._client),
            public_paths=PAGE_PATHS,
            observer=self._seeing.observer,
            processes=lambda: serve.get_replica_context().world_size or 1,
            answer_request_id=False,  # Serve's own middleware does
            on_shutdown=self._close,
        )
        return self._seeing.around(app)

    async def _close(self) -> None:
        await self._client.close()
        await self._seeing.close()

    async def _announce(self) -> None:
        try:
            await asyncio.to_thread(announce, self._client.info.served_model_name)
        except Exception:  # the line is a courtesy; serving doesn't depend on it
            logger.warning("Could not find out the URL of this application", exc_info=True)
