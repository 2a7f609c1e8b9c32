"""A load generator's HTTP client: no more than what a stream's timing needs.

Generator and server share the cores, and httpx, which everything else here uses, parses and copies every chunk: with
it the benchmark would in good part measure its own client. This one reads bytes and looks at their end;
``benchmark_cpu_us_per_token`` in the results says what it costs.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


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


class Connection:
    """One keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect."""
        return cls(*await asyncio.open_connection(host, port, limit=1 << 20))

    async def stream(self, path: str, body: bytes) -> Timing:
        """POST a streaming request with ``include_usage`` and read the stream to its end.

        Raises:
            RuntimeError: the answer isn't a complete stream.
        """
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        sent = time.perf_counter()
        self._writer.write(head.encode() + body)
        response = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in response.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"{response.decode()}{(await self._reader.read(4096)).decode()}")
        first = last = 0.0
        end = b""
        while not end.endswith(b"0\r\n\r\n"):
            data = await self._reader.read(1 << 16)
            if not data:
                raise RuntimeError(f"the stream broke off after {end!r}")
            last = time.perf_counter()
            first = first or last
            end = end[-2000:] + data
        return Timing(sent, first, last, _completion_tokens(end))

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


def _completion_tokens(end: bytes) -> int:
    event = next(line for line in end.split(b"\n") if b'"usage":{' in line)
    return int(json.loads(event.removeprefix(b"data: "))["usage"]["completion_tokens"])


def encode(body: dict[str, Any]) -> bytes:
    """A request body that asks for a stream with counts at its end."""
    return json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
