"""Where requests wait while no engine is up: a bounded number of them, for a bounded time."""

from __future__ import annotations

import asyncio
import time

from deployments.config import FailoverConfig
from engine.errors import EngineDeadError, OverloadedError

UNKNOWN_START_S = 60.0
"""How long an engine takes to start, as long as none has been seen to. A guess."""


class WaitingRoom:
    """Lives on one event loop."""

    def __init__(self, config: FailoverConfig) -> None:
        self._config = config
        self._arrival = asyncio.Event()
        self._held = 0
        self._empty_since: float | None = time.monotonic()
        self._start_seconds: float | None = None

    def __len__(self) -> int:
        """Requests that wait now."""
        return self._held

    def engine_came(self, start_seconds: float) -> None:
        """An engine has come up, which took so long to start; whoever waits tries again."""
        self._empty_since = None
        self._start_seconds = start_seconds
        self._arrival.set()
        self._arrival = asyncio.Event()

    def engines_gone(self) -> None:
        """The last engine was lost."""
        if self._empty_since is None:
            self._empty_since = time.monotonic()

    def retry_after_s(self) -> float:
        """Seconds until there should be an engine: how long the last one took to start, less the time without any."""
        expected = UNKNOWN_START_S if self._start_seconds is None else self._start_seconds
        passed = 0.0 if self._empty_since is None else time.monotonic() - self._empty_since
        return max(1.0, expected - passed)

    async def wait(self, *, since: float, admitted: bool) -> None:
        """Wait until an engine has come up.

        Args:
            since: ``time.monotonic()`` when the request began to wait.
            admitted: an engine had begun the request, or it has waited here before; it finds room in any case.

        Raises:
            OverloadedError: there is no room for another request.
            EngineDeadError: the time is over.
        """
        if not admitted and self._held >= self._config.max_held:
            raise OverloadedError(
                f"no engine is running right now, and {self._held} requests wait for one already",
                retry_after_s=self.retry_after_s(),
            )
        self._held += 1
        try:
            async with asyncio.timeout(max(0.0, since + self._config.hold_s - time.monotonic())):
                await self._arrival.wait()
        except TimeoutError:
            raise EngineDeadError(
                f"no engine came up within {self._config.hold_s:g} s; send the request again later",
                retry_after_s=self.retry_after_s(),
            ) from None
        finally:
            self._held -= 1
