"""Requests straight into an ASGI app: no sockets, any bytes, and the protocol's rules checked on every answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

Headers = Sequence[tuple[bytes, bytes]]
JSON = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: str) -> str | None:
        values = [value.decode("latin-1") for key, value in self.headers if key.decode("latin-1") == name]
        assert len(values) <= 1, f"{name} was sent {len(values)} times"
        return values[0] if values else None


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    headers: Headers = (),
    body: bytes = b"",
    pieces: int = 1,
    query: bytes = b"",
    leave_after: asyncio.Event | None = None,
) -> Answer:
    """Send a request and read the whole answer.

    Args:
        pieces: chunks that the body comes in.
        leave_after: the client hangs up when this is set.
    """
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "root_path": "",
        "query_string": query,
        "headers": [(b"host", b"test"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    size = max(-(-len(body) // pieces), 1)
    chunks = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": chunk, "more_body": index + 1 < len(chunks)}
        for index, chunk in enumerate(chunks)
    ]
    messages.reverse()
    never = leave_after or asyncio.Event()
    start: dict[str, Any] | None = None
    parts: list[bytes] = []
    complete = False

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await never.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal start, complete
        assert not complete, "something was sent behind the end of an answer"
        if message["type"] == "http.response.start":
            assert start is None, "two answers to one request"
            start = message
            for name, value in message["headers"]:
                assert isinstance(name, bytes), name
                assert isinstance(value, bytes), value
                assert name == name.lower(), name
                assert not set(value) & set(b"\r\n\0"), value
        else:
            assert start is not None, "a body before the status"
            parts.append(message.get("body", b""))
            complete = not message.get("more_body", False)

    await app(scope, receive, send)
    assert start is not None, "no answer"
    assert complete or never.is_set(), "the answer has no end"
    return Answer(start["status"], list(start["headers"]), b"".join(parts))
