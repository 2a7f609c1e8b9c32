"""The endpoints: which path is answered by what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from deployments.access.call import admit
from deployments.observer import Observer
from deployments.openai.answer import Job, respond
from deployments.openai.completions import prepare_completion
from deployments.openai.conversation import prepare_chat
from deployments.openai.errors import ApiError, from_exception
from deployments.openai.generation import Engine
from deployments.openai.http import ClientGone, check_json_content, read_body, send_error, send_json, until_disconnect
from deployments.openai.models import check_model, installed_version, model_card
from deployments.openai.pace import Pacer
from deployments.openai.prompts import Prompts
from deployments.openai.sse import encode
from deployments.openai.tokenization import detokenize, tokenize, tokenizer_info
from engine.tokenizer import Tokenizer

Prepare = Callable[[bytes, Engine, Prompts], Awaitable[Job]]
Compute = Callable[[bytes, Engine, Prompts], Awaitable[dict[str, Any]]]
Serve = Callable[[bytes, Scope, Send], Awaitable[None]]


class BodyEndpoint:
    """An ASGI endpoint that reads a JSON body within bounds, then answers it; its work ends when the client leaves."""

    def __init__(self, serve: Serve, *, max_body_bytes: int) -> None:
        self._answer = serve
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            check_json_content(scope)
            body = await read_body(scope, receive, self._max_body_bytes)
        except ClientGone:
            return
        except ApiError as error:
            await send_error(send, error)
            return
        await until_disconnect(receive, self._serve(body, scope, send))

    async def _serve(self, body: bytes, scope: Scope, send: Send) -> None:
        try:
            await self._answer(body, scope, send)
        except Exception as error:
            await send_error(send, from_exception(error))


def openai_routes(
    engine: Engine,
    *,
    tokenizer: Tokenizer,
    max_body_bytes: int,
    observer: Observer | None = None,
    sampling_defaults: Mapping[str, Any] | None = None,
    tool_call_parser: str | None = None,
) -> list[BaseRoute]:
    """The endpoints of OpenAI's protocol over ``engine``.

    Args:
        engine: started, and living on the event loop that serves the app.
        max_body_bytes: largest request body that is read; more is answered with 413.
        observer: hears of fields that nobody knows.
        sampling_defaults: for options that requests leave open (:func:`engine.sampling_params.default_sampling`).
        tool_call_parser: how the model writes tool calls, where its chat template doesn't tell.

    Raises:
        ConfigError: there is no tool call parser of that name.
    """
    prompts = Prompts(
        tokenizer, observer=observer, sampling_defaults=sampling_defaults, tool_call_parser=tool_call_parser
    )
    pacer = Pacer()

    def generation(path: str, prepare: Prepare) -> Route:
        async def generate(body: bytes, scope: Scope, send: Send) -> None:
            job = await prepare(body, engine, prompts)
            admit(scope, job)
            await respond(engine, job, send, pacer)

        return Route(path, BodyEndpoint(generate, max_body_bytes=max_body_bytes), methods=["POST"])

    def computation(path: str, compute: Compute) -> Route:
        async def answer(body: bytes, _: Scope, send: Send) -> None:
            await send_json(send, encode(await compute(body, engine, prompts)))

        return Route(path, BodyEndpoint(answer, max_body_bytes=max_body_bytes), methods=["POST"])

    async def models(_: Request) -> Response:
        return json_response(encode({"object": "list", "data": [model_card(engine.info)]}))

    async def model(request: Request) -> Response:
        check_model(engine.info, request.path_params["model"])
        return json_response(encode(model_card(engine.info)))

    async def health(_: Request) -> Response:
        if engine.healthy():
            return json_response(b'{"status":"ok"}')
        raise ApiError(503, "No engine makes progress", code="engine_unavailable")

    async def about_tokenizer(_: Request) -> Response:
        return json_response(encode(tokenizer_info(engine, tokenizer)))

    async def version(_: Request) -> Response:
        return json_response(encode({"version": await asyncio.to_thread(installed_version)}))

    return [
        generation("/v1/chat/completions", prepare_chat),
        generation("/v1/completions", prepare_completion),
        computation("/tokenize", tokenize),
        computation("/detokenize", detokenize),
        Route("/tokenizer_info", about_tokenizer),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/health", health),
        Route("/ready", health),
        Route("/version", version),
    ]


def json_response(body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer whose body is JSON already."""
    return Response(body, status_code=status, media_type="application/json", headers=headers)
