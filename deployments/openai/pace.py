"""How often a stream writes: at once for a few clients, in fewer and larger chunks for many."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_PER_STREAM = 2e-3
"""Each further stream lengthens the pause of all by this much, so an ingress process writes about 500 chunks a second
while it has up to 29. Tokens that come during a pause travel in one chunk: fewer messages through Serve's proxy."""

UNPACED_STREAMS = 4
"""So many streams write every token the moment it comes."""

MAX_PAUSE_S = 0.05
"""Longest pause: what a reader does not notice."""


class Pacer:
    """Counts the streams of one ingress process, and spaces their chunks."""

    def __init__(self) -> None:
        self._open = 0

    @property
    def interval(self) -> float:
        """Seconds between two chunks of a stream now; 0 while there are few."""
        return min(max(self._open - UNPACED_STREAMS, 0) * SECONDS_PER_STREAM, MAX_PAUSE_S)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A stream is open within."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def pause(self) -> None:
        """Called after a chunk was sent: returns when the next may be."""
        if (interval := self.interval) > 0:
            await asyncio.sleep(interval)
