"""The endpoints: which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from deployments.openai.answer import Job, respond
from deployments.openai.chat import prepare_chat
from deployments.openai.completions import prepare_completion
from deployments.openai.errors import ApiError, from_exception
from deployments.openai.generation import Engine
from deployments.openai.http import ClientGone, check_json_content, read_body, send_error, until_disconnect
from deployments.openai.models import check_model, model_card
from deployments.openai.pace import Pacer
from deployments.openai.prompts import Prompts
from deployments.openai.sse import encode
from engine.tokenizer import Tokenizer

Prepare = Callable[[bytes, Engine, Prompts], Awaitable[Job]]


class GenerationEndpoint:
    """An ASGI endpoint that reads a request, validates it whole, then generates."""

    def __init__(
        self, engine: Engine, prompts: Prompts, prepare: Prepare, *, pacer: Pacer, max_body_bytes: int
    ) -> None:
        self._engine = engine
        self._pacer = pacer
        self._prompts = prompts
        self._prepare = prepare
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; the engine's work for it ends when the client leaves."""
        try:
            check_json_content(scope)
            body = await read_body(scope, receive, self._max_body_bytes)
        except ClientGone:
            return
        except ApiError as error:
            await send_error(send, error)
            return
        await until_disconnect(receive, self._serve(body, send))

    async def _serve(self, body: bytes, send: Send) -> None:
        try:
            job = await self._prepare(body, self._engine, self._prompts)
            await respond(self._engine, job, send, self._pacer)
        except Exception as error:
            await send_error(send, from_exception(error))


def openai_routes(engine: Engine, *, tokenizer: Tokenizer, max_body_bytes: int) -> list[BaseRoute]:
    """The endpoints of OpenAI's protocol over ``engine``.

    Args:
        engine: started, and living on the event loop that serves the app.
        max_body_bytes: largest request body that is read; more is answered with 413.
    """
    prompts = Prompts(tokenizer)
    pacer = Pacer()

    def generation(path: str, prepare: Prepare) -> Route:
        endpoint = GenerationEndpoint(engine, prompts, prepare, pacer=pacer, max_body_bytes=max_body_bytes)
        return Route(path, endpoint, methods=["POST"])

    async def models(_: Request) -> Response:
        return json_response(encode({"object": "list", "data": [model_card(engine.info)]}))

    async def model(request: Request) -> Response:
        check_model(engine.info, request.path_params["model"])
        return json_response(encode(model_card(engine.info)))

    async def health(_: Request) -> Response:
        if engine.healthy():
            return json_response(b'{"status":"ok"}')
        raise ApiError(503, "No engine makes progress", code="engine_unavailable")

    return [
        generation("/v1/chat/completions", prepare_chat),
        generation("/v1/completions", prepare_completion),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/health", health),
    ]


def json_response(body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer whose body is JSON already."""
    return Response(body, status_code=status, media_type="application/json", headers=headers)
