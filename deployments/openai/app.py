"""The ASGI application: what every route has in common."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from deployments.access.config import AccessConfig
from deployments.access.middleware import Access, AccessMiddleware
from deployments.observer import Observer
from deployments.openai import schema
from deployments.openai.errors import ApiError, from_exception
from deployments.openai.generation import Engine
from deployments.openai.routes import json_response, openai_routes
from engine.tokenizer import Tokenizer

_EXPOSED_HEADERS = (
    "retry-after",
    "retry-after-ms",
    "x-request-id",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
)
"""What a page of another origin may read of an answer, besides its body."""


def create_app(
    engine: Engine,
    *,
    tokenizer: Tokenizer,
    access: AccessConfig | None = None,
    max_body_bytes: int | None = None,
    sampling_defaults: Mapping[str, Any] | None = None,
    tool_call_parser: str | None = None,
    routes: Sequence[BaseRoute] = (),
    public_paths: Sequence[str] = (),
    observer: Observer | None = None,
    processes: Callable[[], int] = lambda: 1,
    answer_request_id: bool = True,
    on_shutdown: Callable[[], Awaitable[None]] | None = None,
) -> Starlette:
    """The OpenAI endpoints over ``engine``.

    Args:
        engine: started, and living on the event loop that serves the app.
        access: keys, limits and logs; by default everybody is served, and requests are logged to stderr.
        max_body_bytes: largest request body that is read, instead of the one in ``access``.
        sampling_defaults, tool_call_parser: see :func:`openai_routes`.
        routes: served beside the API's own, such as those of the page and of the metrics.
        public_paths: those of ``routes`` that need no key, besides the ones in ``access``.
        observer: hears of refused requests, and of fields that nobody knows.
        processes: how many processes serve this application, which share the limits of each key.
        answer_request_id: whether answers carry X-Request-Id. Serve adds it itself, so not behind Serve.
        on_shutdown: awaited when the server ends.

    Raises:
        ConfigError: the API keys can't be read, or the access log can't be opened.
    """
    config = access or AccessConfig()
    config = config.model_copy(update={"public_paths": (*config.public_paths, *public_paths)})
    observer = observer or Observer()
    door = Access(
        config,
        engine,
        tokenizer=tokenizer,
        observer=observer,
        processes=processes,
        answer_request_id=answer_request_id,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await door.start()
        yield
        await door.close()
        if on_shutdown is not None:
            await on_shutdown()

    async def openapi(_: Request) -> Response:
        return json_response(schema.encoded(engine.info.served_model_name))

    api = openai_routes(
        engine,
        tokenizer=tokenizer,
        max_body_bytes=max_body_bytes or config.max_body_bytes,
        observer=observer,
        sampling_defaults=sampling_defaults,
        tool_call_parser=tool_call_parser,
    )
    middleware = [Middleware(AccessMiddleware, access=door)]
    if config.cors_origins:
        # Outermost: a browser asks for permission without a key, and wants to read refusals too.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[*api, Route("/openapi.json", openapi), *routes],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
        lifespan=lifespan,
    )
    app.state.access = door
    app.router.redirect_slashes = False  # a redirected POST comes back as a GET, to a host that the client named
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (404, 405) in OpenAI's shape."""
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    path = request.scope["path"]  # request.url has the Host header in it, which may be anything
    message = f"{request.method} {path} does not exist here"
    if status == 405 and headers:
        message = f"{path} does not take {request.method}; allowed: {headers['Allow']}"
    return json_response(ApiError(status, message).body(), status=status, headers=dict(headers or {}))


async def _api_error(_: Request, error: Exception) -> Response:
    refusal = from_exception(error)
    return json_response(refusal.body(), status=refusal.status, headers=refusal.headers)
