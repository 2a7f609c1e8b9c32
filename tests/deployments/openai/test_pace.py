"""A few streams write at once; many write less often, never less than twenty times a second, and together no more."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from deployments.openai.pace import MAX_PAUSE_S, SECONDS_PER_STREAM, UNPACED_STREAMS, Pacer


@pytest.mark.parametrize("streams", range(UNPACED_STREAMS + 1))
def test_a_few_streams_never_wait(streams: int) -> None:
    pacer = Pacer()
    with ExitStack() as stack:
        for _ in range(streams):
            stack.enter_context(pacer.stream())
        waiting = pacer.pause()
        with pytest.raises(StopIteration):
            waiting.send(None)  # a coroutine that gave up control even once would not end here


@pytest.mark.parametrize("streams", [5, 10, 29, 100, 10_000])
def test_many_streams_share_a_bounded_rate(streams: int) -> None:
    pacer = Pacer()
    with ExitStack() as stack:
        for _ in range(streams):
            stack.enter_context(pacer.stream())
        assert 0 < pacer.interval <= MAX_PAUSE_S
        assert (
            pacer.interval == MAX_PAUSE_S or (streams - UNPACED_STREAMS) / pacer.interval <= 1.001 / SECONDS_PER_STREAM
        )
        asyncio.run(pacer.pause())
    assert pacer.interval == 0, "closed streams still count"
