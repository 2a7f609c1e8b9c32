"""Requests as they come: all at once, or at random (Poisson), on connections that are open already."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from benchmarks.http_client import Connection, Timing, encode

PROMPT = "Once upon a time there was a server that answered everybody who asked, and it never once kept anyone waiting."


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of some requests."""

    timings: list[Timing]
    seconds: float
    """From the first that was sent to the end of the last."""
    errors: list[str]
    reconnects: int
    client_cpu_seconds: float


class Client:
    """Sends requests to one server; lives on one event loop, and keeps its connections from load to load."""

    def __init__(self, host: str, port: int, *, num_tokens: int) -> None:
        self._host = host
        self._port = port
        self._num_tokens = num_tokens
        self._idle: list[Connection] = []
        self._errors: list[str] = []
        self._seed = 0

    async def burst(self, path: str, concurrency: int, *, each: int = 1) -> Outcome:
        """``concurrency`` clients at once send ``each`` requests, the next when the last is complete."""
        while len(self._idle) < concurrency:
            self._idle.append(await Connection.open(self._host, self._port))

        async def client() -> list[Timing]:
            return [timing for _ in range(each) if (timing := await self._send(path)) is not None]

        return await self._measure(lambda: [client() for _ in range(concurrency)])

    async def poisson(self, path: str, *, per_second: float, seconds: float, seed: int) -> Outcome:
        """Requests at random, whether or not those before are complete."""
        rng = random.Random(seed)
        times = [0.0]
        while (at := times[-1] + rng.expovariate(per_second)) < seconds:
            times.append(at)
        started = time.perf_counter()

        async def request(at: float) -> list[Timing]:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            timing = await self._send(path)
            return [] if timing is None else [timing]

        return await self._measure(lambda: [request(at) for at in times])

    def close(self) -> None:
        """Hang up."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _measure(self, clients: Callable[[], list[Coroutine[Any, Any, list[Timing]]]]) -> Outcome:
        self._errors = []
        connections = list(self._idle)
        reconnects = sum(connection.reconnects for connection in connections)
        cpu = _cpu_seconds()
        started = time.perf_counter()
        found = await asyncio.gather(*clients())
        seconds = time.perf_counter() - started
        return Outcome(
            timings=[timing for timings in found for timing in timings],
            seconds=seconds,
            errors=self._errors,
            reconnects=sum(connection.reconnects for connection in self._idle) - reconnects,
            client_cpu_seconds=_cpu_seconds() - cpu,
        )

    async def _send(self, path: str) -> Timing | None:
        self._seed += 1
        # No two prompts begin alike, so no prefix is cached.
        prompt = f"{self._seed}. {PROMPT}"
        body = {"model": "synthetic", "prompt": prompt, "max_tokens": self._num_tokens, "ignore_eos": True}
        data = encode({**body, "seed": self._seed})
        connection = self._idle.pop() if self._idle else await Connection.open(self._host, self._port)
        try:
            timing = await connection.stream(path, data)
            if timing.num_tokens != self._num_tokens:
                raise RuntimeError(f"{timing.num_tokens} tokens came, not {self._num_tokens}")
        except (RuntimeError, OSError) as error:
            self._errors.append(str(error)[:500])
            return None
        finally:
            self._idle.append(connection)
        return timing


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
