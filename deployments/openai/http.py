"""The few things of HTTP that the endpoints need, straight on ASGI: fewer layers per chunk than a response class."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from deployments.observer import SPAN
from deployments.openai.errors import ApiError

MAX_BODY_BYTES = 8 << 20
"""Largest request body by default. A 128k-token prompt is about half a megabyte of text."""


_MAX_DIGITS = 18
"""Of a Content-Length; Python refuses to read numbers of thousands of digits."""


class ClientGone(Exception):
    """The client hung up before its request was complete; there is nobody to answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """A request header by its lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


def check_json_content(scope: Scope) -> None:
    """Refuse a body that declares itself to be something other than JSON.

    Raises:
        ApiError: 415.
    """
    declared = header(scope, b"content-type")
    if declared is None:
        return
    media_type = declared.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, f"Content-Type is {media_type!r}; expected 'application/json'")


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Read a request body, keeping at most ``limit`` bytes and one chunk of it.

    Raises:
        ApiError: 413 as soon as the declared or the received length passes the limit.
        ClientGone: the connection closed before the end.
    """
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdecimal() and (len(declared) > _MAX_DIGITS or int(declared) > limit):
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes, the limit of this server")


async def send_json(send: Send, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Send a whole JSON response."""
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    fields += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError) -> None:
    """Send an OpenAI error body with its status."""
    await send_json(send, error.body(), status=error.status, headers=error.headers)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` to its end, or cancel it the moment the client hangs up or the caller is cancelled.

    The request body must have been read. Returns when ``work`` has cleaned up.

    ``work`` runs in a context that is empty but for the request's trace. Serve marks the context of a request, and when
    its client leaves, Ray cancels all actor calls that were made in it (ray issue 52476), but calls to an engine carry
    other requests too.
    """

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    context = contextvars.Context()
    if (span := SPAN.get()) is not None:
        context.run(SPAN.set, span)
    worker = asyncio.create_task(work, context=context)
    watcher = asyncio.create_task(hung_up())
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        worker.cancel()
        await asyncio.wait((worker,))
    if not worker.cancelled():
        worker.result()
