"""An application with keys and a log, for the tests of access."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from deployments.access.config import AccessConfig
from deployments.access.store import KeyFile, KeyOptions
from deployments.observer import Observer
from deployments.openai.app import create_app
from engine.tokenizer import Tokenizer
from tests.fuzz.asgi import JSON, Answer, call
from tests.fuzz.synthetic import SyntheticEngine

MODEL = Path(__file__).resolve().parents[3] / "examples" / "ernie-tiny" / "bf16"
CHAT = "/v1/chat/completions"
CANARY = "canary7f3a9c"


class Refusals(Observer):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def refused(self, reason: str) -> None:
        self.reasons.append(reason)


class Door:
    """An app with keys and a log, and what its clients and its operator see."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        engine: Any = None,
        app: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.keys = KeyFile(folder / "keys.jsonl")
        self.admin = self.add("admin")
        self.engine = engine or SyntheticEngine(vocab_size=tokenizer.used_vocab_size)
        self.observer = Refusals()
        self.log = folder / "access.log"
        config = {"keys_file": str(self.keys.path), "log": str(self.log), **options}
        self.app: Starlette = create_app(
            self.engine, tokenizer=tokenizer, access=AccessConfig(**config), observer=self.observer, **(app or {})
        )

    def add(self, name: str, **options: Any) -> str:
        return self.keys.add(KeyOptions(name=name, **options), now=datetime.now(UTC))[0]

    async def ask(self, key: str | None, path: str = CHAT, *, method: str = "POST", **options: Any) -> Answer:
        headers = [*options.pop("headers", ()), JSON]
        if key is not None:
            headers.append((b"authorization", f"Bearer {key}".encode("latin-1")))
        body = options.pop("body", None)
        if body is None:
            fields = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 4, **options.pop("fields", {})}
            body = json.dumps(fields).encode() if method == "POST" else b""
        return await call(self.app, method, path, headers=headers, body=body, **options)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def check(answer: Answer, status: int, code: str | None = None) -> str:
    assert answer.status == status, answer
    assert answer.header("content-type") == "application/json"
    error = json.loads(answer.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code
    return str(error["message"])


def run(scenario: Awaitable[None]) -> None:
    async def main() -> None:
        await scenario

    asyncio.run(main())


async def reload(here: Door) -> None:
    await here.app.state.access.reload()


class Failing(SyntheticEngine):
    """Fails in one way or another."""

    def __init__(self, error: Exception, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size)
        self.error = error

    async def generate(self, request: Any) -> Any:
        raise self.error
        yield
