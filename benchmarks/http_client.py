"""A load generator's HTTP client: no more than what a stream's timing needs.

Generator and server share the cores, and httpx, which everything else here uses, parses and copies every chunk: with
it the benchmark would in good part measure its own client. This one takes bytes as they come and looks at their end;
``benchmark_cpu_us_per_token`` in the results says what it costs.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, cast

_KEPT = 2000
"""Bytes of a stream's end that are looked at: the counts are there."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request was sent and its tokens came; ``time.perf_counter()`` seconds."""

    sent: float
    first: float
    last: float
    num_tokens: int

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.sent

    @property
    def tpot(self) -> float:
        """Seconds for each token after the first."""
        return (self.last - self.first) / max(self.num_tokens - 1, 1)


class _Answer(asyncio.Protocol):
    """The bytes of one connection, and the answer that is awaited on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class, but by behaviour

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.first == 0.0:
            self.head += data
            split = self.head.find(b"\r\n\r\n")
            if split < 0 or len(self.head) == split + 4:
                return
            data = self.head[split + 4 :]
            self.head = self.head[:split]
            self.first = now
        self.last = now
        self.end = data if len(data) >= _KEPT else self.end[-_KEPT:] + data
        if (self.end.endswith(b"0\r\n\r\n") or not self._is_stream()) and self._waiter is not None:
            self._finish(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._waiter is not None and not self._waiter.done():
            self._finish(ConnectionResetError(f"the connection was closed after {(self.head + self.end)[-500:]!r}"))

    def expect(self) -> asyncio.Future[None]:
        """Await an answer that is about to be asked for."""
        self._clear()
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _is_stream(self) -> bool:
        return b" 200 " in self.head.split(b"\r\n", 1)[0]

    def _clear(self) -> None:
        self.first = self.last = 0.0
        self.head = self.end = b""

    def _finish(self, error: Exception | None) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None or waiter.done():
            return
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)


class Connection:
    """One keep-alive connection.

    A server may close it between two requests, as HAProxy does with those of a worker that a new configuration has
    replaced; then the request is sent once more on a new one (RFC 9112, 9.3.1), and :attr:`reconnects` counts it.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._answer: _Answer | None = None
        self.reconnects = 0

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect."""
        connection = cls(host, port)
        await connection._connect()
        return connection

    async def stream(self, path: str, body: bytes) -> Timing:
        """POST a streaming request with ``include_usage`` and read the stream to its end.

        Raises:
            RuntimeError: the answer isn't a complete stream.
        """
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        request = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
        sent = time.perf_counter()
        answer = self._answer if self._answer is not None and not self._answer.closed else await self._connect()
        try:
            await self._ask(answer, request)
        except ConnectionResetError as error:
            if answer.head:
                raise RuntimeError(f"the stream broke off: {error}") from None
            answer = await self._connect()
            self.reconnects += 1
            await self._ask(answer, request)
        status = answer.head.split(b"\r\n", 1)[0]
        if b" 200 " not in status or b'"error"' in answer.end:
            self.close()
            raise RuntimeError(f"{status.decode()} {answer.end.decode(errors='replace')}")
        return Timing(sent, answer.first, answer.last, _completion_tokens(answer.end))

    def close(self) -> None:
        """Hang up."""
        if self._answer is not None and self._answer.transport is not None:
            self._answer.transport.close()
        self._answer = None

    async def _connect(self) -> _Answer:
        loop = asyncio.get_running_loop()
        _, self._answer = await loop.create_connection(_Answer, self._host, self._port)
        return self._answer

    async def _ask(self, answer: _Answer, request: bytes) -> None:
        done = answer.expect()
        if answer.transport is None:
            raise ConnectionResetError("not connected")
        answer.transport.write(request)
        await done


def _completion_tokens(end: bytes) -> int:
    event = next(line for line in end.split(b"\n") if b'"usage":{' in line)
    return int(json.loads(event.removeprefix(b"data: "))["usage"]["completion_tokens"])


def encode(body: dict[str, Any]) -> bytes:
    """A request body that asks for a stream with counts at its end."""
    return json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
