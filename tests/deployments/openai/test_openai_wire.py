"""Chunks are JSON whatever the text, and requests don't share more than they should."""

from __future__ import annotations

import asyncio
import contextvars
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.openai.http import until_disconnect
from deployments.openai.sse import ChunkWriter

texts = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(text=texts, reason=st.none() | st.just("stop"), stop=st.none() | texts, include_usage=st.booleans())
def test_any_text_makes_a_valid_chunk(text: str, reason: str | None, stop: str | None, include_usage: bool) -> None:
    envelope = {"id": 'a"b', "model": "ü\n"}
    chunks = ChunkWriter(
        envelope, num_choices=3, before_text=b'"delta":{"content":', after_text=b"}", include_usage=include_usage
    )
    plain = chunks.text(2, text)
    rich = chunks.rich(2, text, logprobs={"content": []}, finish_reason=reason, stop_reason=stop)
    for data in (plain, rich):
        assert data.startswith(b"data: ")
        assert data.endswith(b"\n\n")
        assert data.count(b"\n") == 2
        found = json.loads(data.removeprefix(b"data: "))
        (choice,) = found.pop("choices")
        assert found == envelope | ({"usage": None} if include_usage else {})
        assert choice["index"] == 2
        assert choice["delta"] == {"content": text}
    assert choice["finish_reason"] == reason
    assert choice.get("stop_reason") == stop
    assert choice["logprobs"] == {"content": []}


def never() -> Any:
    return asyncio.get_running_loop().create_future()


def test_work_runs_outside_of_the_context_of_its_request() -> None:
    """Else Ray would cancel, with one request, the actor calls that carry others."""
    mark = contextvars.ContextVar("mark", default="none")
    seen: list[str] = []

    async def work() -> None:
        seen.append(mark.get())

    async def request() -> None:
        mark.set("request")
        await until_disconnect(never, work())
        seen.append(mark.get())

    asyncio.run(request())
    assert seen == ["none", "request"]


@pytest.mark.parametrize("by_client", [True, False])
def test_work_has_cleaned_up_when_its_request_ends(by_client: bool) -> None:
    cleaned: list[str] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await never()
        finally:
            await asyncio.sleep(0)
            cleaned.append("up")

    async def request() -> None:
        task = asyncio.create_task(until_disconnect(receive, work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if by_client:
            gone.set()
            await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert cleaned == ["up"]

    asyncio.run(request())


def test_what_work_raises_is_raised() -> None:
    async def work() -> None:
        raise LookupError("found nothing")

    with pytest.raises(LookupError, match="found nothing"):
        asyncio.run(until_disconnect(never, work()))
