"""An event loop with a clock of its own: what takes a minute takes no time, and goes the same way each time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TURN_S = 1e-6
"""How long a turn of the loop takes: it calls timers a little too soon, and who looks at the clock then waits anew."""


class _Jumping(selectors.DefaultSelector):
    """Doesn't wait. Where there is nothing to do until a timer, the clock goes on to it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if timeout is None and not ready:
            raise RuntimeError("everything waits for something that never comes")
        self.now += TURN_S
        if not ready:
            self.now += max(timeout or 0.0, 0.0)
        return ready


class SimulatedLoop(asyncio.SelectorEventLoop):
    """For what has no threads and talks to nobody."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)
        self.complaints: list[str] = []
        """Errors that nobody caught."""
        self.set_exception_handler(lambda _, context: self.complaints.append(repr(context)))

    def time(self) -> float:
        return self._jumping.now


def simulate(coroutine: Coroutine[Any, Any, T]) -> T:
    """As ``asyncio.run``."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(coroutine)


async def settle() -> None:
    """Let everybody do what there is to do now."""
    for _ in range(10):
        await asyncio.sleep(0)
