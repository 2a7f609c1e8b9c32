"""The HTTP face of an application: one Serve deployment that hosts the OpenAI endpoints."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from deployments.announce import announce
from deployments.client import EngineClient
from deployments.openai.app import create_app
from deployments.openai.http import MAX_BODY_BYTES
from engine.checkpoint.hub import resolve_model
from engine.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")


@serve.deployment(name="Ingress", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Ingress:
    """Tokenizes, submits to the engines, turns tokens into text and server-sent events.

    Admission is the engine scheduler's business, so Serve's own limit on ongoing requests is out of the way.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engines: DeploymentHandle[Any], *, max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        """Wait for the first engine, then load its tokenizer.

        Args:
            engines: handle of the EngineReplica deployment, bound by :func:`deployments.app.build`.
            max_body_bytes: largest request body that is read; more is answered with 413.
        """
        self._client = EngineClient(engines)
        await self._client.start()
        folder = await asyncio.to_thread(resolve_model, self._client.info.model_path, weights=False)
        self._tokenizer = Tokenizer.from_folder(folder)
        self._max_body_bytes = max_body_bytes
        await self._announce()

    def __serve_build_asgi_app__(self) -> Starlette:
        """Make the ASGI app; Serve calls this once, after the constructor, and runs its lifespan."""
        return create_app(
            self._client,
            tokenizer=self._tokenizer,
            max_body_bytes=self._max_body_bytes,
            on_shutdown=self._client.close,
        )

    async def _announce(self) -> None:
        try:
            await asyncio.to_thread(announce, self._client.info.served_model_name)
        except Exception:  # the line is a courtesy; serving doesn't depend on it
            logger.warning("Could not find out the URL of this application", exc_info=True)
