"""The ASGI application: what every route has in common."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from deployments.openai.errors import ApiError, from_exception
from deployments.openai.generation import Engine
from deployments.openai.http import MAX_BODY_BYTES
from deployments.openai.routes import json_response, openai_routes
from engine.tokenizer import Tokenizer


def create_app(
    engine: Engine,
    *,
    tokenizer: Tokenizer,
    max_body_bytes: int = MAX_BODY_BYTES,
    on_shutdown: Callable[[], Awaitable[None]] | None = None,
) -> Starlette:
    """The OpenAI endpoints over ``engine``.

    Args:
        engine: started, and living on the event loop that serves the app.
        max_body_bytes: largest request body that is read; more is answered with 413.
        on_shutdown: awaited when the server ends.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        if on_shutdown is not None:
            await on_shutdown()

    return Starlette(
        routes=openai_routes(engine, tokenizer=tokenizer, max_body_bytes=max_body_bytes),
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
        lifespan=lifespan,
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (404, 405) in OpenAI's shape."""
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    message = f"{request.method} {request.url.path} does not exist here"
    if status == 405 and headers:
        message = f"{request.url.path} does not take {request.method}; allowed: {headers['Allow']}"
    return json_response(ApiError(status, message).body(), status=status, headers=dict(headers or {}))


async def _api_error(_: Request, error: Exception) -> Response:
    refusal = from_exception(error)
    return json_response(refusal.body(), status=refusal.status, headers=refusal.headers)
