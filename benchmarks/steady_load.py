"""A steady load of known answers: clients that ask one request after the other, and compare what they get."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 300.0
"""Longest wait of a client: engines may have to start meanwhile, on a machine that takes long for that."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client has received."""

    text: str
    tokens: list[str]
    logprobs: list[float]
    finish_reason: str | None

    def differs(self, other: Answer) -> bool:
        """Whether any token is another one, or a log probability is off by more than rounding."""
        same = (self.text, self.tokens, self.finish_reason) == (other.text, other.tokens, other.finish_reason)
        return not same or any(abs(a - b) > 1e-3 for a, b in zip(self.logprobs, other.logprobs, strict=True))


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without its answer, or with another one; times are ``time.monotonic()``."""

    request_id: str
    began: float
    ended: float
    what: str


def questions(model: str, count: int, *, tokens: int) -> list[dict[str, Any]]:
    """Completion requests, half of them greedy and half sampled with a seed."""
    rng = random.Random(5)
    return [
        {
            "model": model,
            "prompt": [rng.randrange(300, 7000) for _ in range(rng.choice([4, 20, 50]))],
            "max_tokens": rng.randrange(tokens // 2, tokens),
            "temperature": float(i % 2),
            "seed": i,
            "logprobs": 1,
            "ignore_eos": True,
        }
        for i in range(count)
    ]


async def ask(
    client: httpx.AsyncClient, question: dict[str, Any], *, stream: bool, headers: dict[str, str] | None = None
) -> Answer:
    """One request; raises for any answer but a complete one."""
    if not stream:
        response = await client.post("/v1/completions", json=question, headers=headers)
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {response.text[:300]}")
        return _answer([response.json()["choices"][0]])
    choices = []
    question = {**question, "stream": True}
    async with client.stream("POST", "/v1/completions", json=question, headers=headers) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return _answer(choices)
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"in the stream: {chunk['error']}")
            choices += chunk["choices"]
    raise RuntimeError("the stream ended without [DONE]")


def _answer(choices: list[dict[str, Any]]) -> Answer:
    parts = [choice["logprobs"] or {} for choice in choices]
    return Answer(
        "".join(choice["text"] for choice in choices),
        [token for part in parts for token in part.get("tokens", [])],
        [value for part in parts for value in part.get("token_logprobs", [])],
        choices[-1]["finish_reason"],
    )


@dataclass
class Load:
    """Clients that ask one request after the other, in a thread of their own, until :meth:`stop`."""

    url: str
    asked: list[dict[str, Any]]
    clients: int
    expected: list[Answer] = field(default_factory=list)
    served: int = 0
    slowest_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def learn(self) -> None:
        """Ask everything once, all together but undisturbed; later answers must be these."""

        async def run() -> None:
            async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
                self.expected = await asyncio.gather(*(ask(client, question, stream=False) for question in self.asked))

        asyncio.run(run())

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._thread.start()

    def stop(self) -> None:
        """Let every client finish the request it is at."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S) as client:
            await asyncio.gather(*(self._client(client, number) for number in range(self.clients)))

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(number)
        stream = number % 2 == 0
        asked = 0
        while not self._stopping.is_set():
            which = rng.randrange(len(self.asked))
            asked += 1
            request_id = f"client-{number}-{asked}"
            began = time.monotonic()
            wrong = None
            try:
                answer = await ask(client, self.asked[which], stream=stream, headers={"x-request-id": request_id})
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            else:
                self.served += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                if answer.differs(self.expected[which]):
                    wrong = f"altered: {answer.text!r}"
            if wrong is not None:
                what = f"question {which}, stream {stream}: {wrong}"
                self.failures.append(Failure(request_id, began, time.monotonic(), what))
