"""What an ingress turned away for want of capacity, told to the engines, whose word Serve's controller hears.

Serve's controller asks replicas for numbers, at ``metrics_interval_s``, and hands those of a pool's replicas to the
autoscaling policy. A request that no engine takes would show up nowhere, so its prompt is reported to some engine's
replica, as if that had turned it away.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Sequence

from deployments.directory import EngineAddress

INTERVAL_S = 1.0
"""Between two reports; what comes meanwhile goes into one."""


class Refusals:
    """Counts what is turned away, and reports it while there is something to report. Lives on one event loop.

    One report goes to one engine, the next to another, so every pool hears of its share by the number of its engines.
    """

    def __init__(
        self,
        engines: Callable[[], Sequence[EngineAddress]],
        send: Callable[[EngineAddress, int], Coroutine[None, None, None]],
        *,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Make it; nothing happens as long as nothing is turned away.

        Args:
            engines: those that are up now, in a lasting order.
            send: tells one of them of so many prompt tokens; a report that is lost is lost.
            interval_s: seconds between two reports.
        """
        self._engines = engines
        self._send = send
        self._interval_s = interval_s
        self._tokens = 0
        self._reports = 0
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None

    def add(self, prompt_tokens: int) -> None:
        """A request was turned away."""
        self._tokens += prompt_tokens
        if self._timer is None:
            # In an empty context: the report is no part of the request that happens to come first.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._interval_s, self._report, context=contextvars.Context())

    def close(self) -> None:
        """Report nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sending is not None:
            self._sending.cancel()

    def _report(self) -> None:
        self._timer = None
        engines = self._engines()
        if not engines:
            self._tokens = 0  # whoever comes now waits for an engine, and Serve knows of those
            return
        engine = engines[self._reports % len(engines)]
        self._reports += 1
        tokens, self._tokens = self._tokens, 0
        self._sending = asyncio.get_running_loop().create_task(self._send(engine, tokens))
