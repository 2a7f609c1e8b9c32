"""What access control costs a request: the door alone, around an application that does nothing.

    python -m benchmarks.access

Prints microseconds of CPU for a request without the door, with it open, and with keys, limits and a log, and for a
chunk of a stream. All are taken in turn, and each number is the median of the rounds.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.access.config import AccessConfig
from deployments.access.middleware import Access, AccessMiddleware
from deployments.access.store import KeyFile, KeyOptions
from deployments.directory import ModelInfo
from deployments.observer import Observer
from engine.messages import EngineRequest, TokenDelta
from engine.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[1] / "examples" / "ernie-tiny" / "bf16"
ROUNDS = 15
REQUESTS = 2000
CHUNKS = 50
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}


class _Engine:
    """The door asks only what is served, and the applications behind it here have no engine."""

    info = ModelInfo(model_path=str(MODEL), served_model_name="tiny", max_model_len=512, created=0)

    def healthy(self) -> bool:
        return True

    def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        raise NotImplementedError


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """A whole answer."""
    await receive()
    await send(START)
    await send({"type": "http.response.body", "body": b"{}"})


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    """A streamed answer."""
    await receive()
    await send(START)
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def receive() -> Any:
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def send(message: Any) -> None:
    pass


async def measure(app: ASGIApp, headers: list[tuple[bytes, bytes]]) -> float:
    """Microseconds of CPU for a request."""
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "root_path": "", "headers": headers}
    started = time.process_time()
    for _ in range(REQUESTS):
        await app(dict(scope), receive, send)
    return (time.process_time() - started) / REQUESTS * 1e6


async def main() -> None:
    tokenizer = Tokenizer.from_folder(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        file = KeyFile(Path(folder) / "keys.jsonl")
        limits: dict[str, Any] = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "max_concurrent"), 10**9)
        for number in range(100):
            key, _ = file.add(KeyOptions(name=f"key {number}", **limits), now=datetime.now(UTC))

        def door(app: ASGIApp, **options: Any) -> ASGIApp:
            config = AccessConfig(**options)
            return AccessMiddleware(app, Access(config, _Engine(), tokenizer=tokenizer, observer=Observer()))

        guarded = {"keys_file": str(file.path), "log": str(Path(folder) / "access.log")}
        apps = {
            "no door": answer,
            "open door, no log": door(answer, log="off"),
            "keys, no log": door(answer, **{**guarded, "log": "off"}),
            "keys, log to a file": door(answer, **guarded),
            "no door, stream": stream,
            "keys, log to a file, stream": door(stream, **guarded),
        }
        headers = [
            (b"host", b"127.0.0.1"),
            (b"user-agent", b"benchmark"),
            (b"content-type", b"application/json"),
            (b"authorization", f"Bearer {key}".encode()),
        ]
        times: dict[str, list[float]] = {name: [] for name in apps}
        for _ in range(ROUNDS):
            for name, app in apps.items():
                times[name].append(await measure(app, headers))
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        low, high = min(found), max(found)
        print(f"{name:28} {medians[name]:7.1f} us a request ({low:.1f} to {high:.1f})")
    per_request = medians["keys, log to a file"] - medians["no door"]
    per_chunk = (medians["keys, log to a file, stream"] - medians["no door, stream"] - per_request) / CHUNKS
    print(f"The door costs {per_request:.1f} us a request and {per_chunk:.2f} us a chunk.")


if __name__ == "__main__":
    asyncio.run(main())
