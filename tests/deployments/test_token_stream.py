from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.mailbox import decode_item
from deployments.token_stream import Demultiplexer, Fanout
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineLoad, EngineRequest, FinishReason, StepOutput, TokenDelta, TokenLogprobs
from engine.sampling_params import SamplingParams

LOAD = EngineLoad(0, 1, 0, 9, 10, steps=3, step_seconds=0.01)


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id, [1], SamplingParams(seed=0), 100)


def token(request_id: str, token_id: int, *, last: bool = False) -> TokenDelta:
    logprobs = [TokenLogprobs(token_id, -0.5, 1, {token_id: -0.5})]
    return TokenDelta(
        request_id, [token_id], FinishReason.LENGTH if last else None, None, logprobs, num_cached_tokens=4
    )


async def first(items: AsyncGenerator[bytes, None]) -> bytes:
    """The next item, for a reader that must not wait long for it."""
    return await asyncio.wait_for(anext(items), 10)


async def settle() -> None:
    """Let callbacks that are due run."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), max_size=80))
@settings(deadline=None, max_examples=60)
def test_every_token_reaches_its_request_once_and_in_order(script: list[tuple[int, bool, bool]]) -> None:
    """Requests of two ingresses; each step has one token, after which each ingress and handler reads or doesn't."""

    async def run() -> None:
        fanout = Fanout(asyncio.get_running_loop(), LOAD)
        names = {f"{side}{i}": side for side in "ab" for i in range(3)}
        streams, demultiplexers, inboxes = {}, {}, {}
        for side in "ab":
            streams[side] = fanout.open(side).items()
            fanout.claim(side, [request(name) for name in names if names[name] == side])
            demultiplexers[side] = Demultiplexer(lambda load: None)
            for name in names:
                if names[name] == side:
                    inboxes[name] = demultiplexers[side].open(name)
            demultiplexers[side].deliver(await first(streams[side]))
        sent: dict[str, list[int]] = {name: [] for name in names}
        got: dict[str, list[int]] = {name: [] for name in names}
        for number, (which, reads, takes) in enumerate(script):
            name = sorted(names)[which]
            fanout.publish(StepOutput([token(name, number)], LOAD))
            sent[name].append(number)
            await settle()
            side = names[name]
            if reads:
                demultiplexers[side].deliver(await first(streams[side]))
                if takes:
                    got[name] += (await inboxes[name].get()).token_ids
        fanout.publish(StepOutput([token(name, 1000, last=True) for name in names], LOAD))
        await settle()
        for side in "ab":
            demultiplexers[side].deliver(await first(streams[side]))
        for name, inbox in inboxes.items():
            delta = await inbox.get()
            assert delta.finish_reason == FinishReason.LENGTH
            assert [p.token_id for p in delta.logprobs or []] == delta.token_ids
            assert delta.num_cached_tokens == 4
            assert [*got[name], *delta.token_ids] == [*sent[name], 1000]

    asyncio.run(run())


def test_refusals_reach_their_request() -> None:
    async def run() -> None:
        fanout = Fanout(asyncio.get_running_loop(), LOAD)
        items = fanout.open("a").items()
        fanout.claim("a", [request("r")])
        demultiplexer = Demultiplexer(lambda load: None)
        inbox = demultiplexer.open("r")
        demultiplexer.deliver(await first(items))
        error = RequestError("too long", field="prompt", code="context_length_exceeded")
        fanout.publish(StepOutput([], LOAD, refused={"r": error}))
        await settle()
        demultiplexer.deliver(await first(items))
        with pytest.raises(RequestError, match="too long") as raised:
            await inbox.get()
        assert (raised.value.field, raised.value.code) == ("prompt", "context_length_exceeded")

    asyncio.run(run())


def test_an_ingress_that_leaves_takes_its_unfinished_requests_along_and_no_others() -> None:
    async def run() -> None:
        fanout = Fanout(asyncio.get_running_loop(), LOAD)
        gone, stays = fanout.open("gone"), fanout.open("stays")
        fanout.claim("gone", [request("done"), request("open")])
        fanout.claim("stays", [request("other")])
        fanout.publish(StepOutput([token("done", 1, last=True), token("open", 2), token("other", 3)], LOAD))
        await settle()
        assert fanout.leave("gone", gone) == ["open"]
        assert fanout.leave("gone", gone) == []
        assert stays.request_ids == {"other"}
        with pytest.raises(EngineDeadError):
            fanout.claim("gone", [request("late")])

    asyncio.run(run())


def test_a_failed_engine_ends_the_streams_after_what_it_had_done() -> None:
    async def run() -> None:
        fanout = Fanout(asyncio.get_running_loop(), LOAD)
        items = fanout.open("a").items()
        fanout.claim("a", [request("r")])
        demultiplexer = Demultiplexer(lambda load: None)
        inbox = demultiplexer.open("r")
        demultiplexer.deliver(await first(items))
        fanout.publish(StepOutput([token("r", 1)], LOAD))
        await settle()
        fanout.fail(EngineDeadError("rank 1 died"))
        demultiplexer.deliver(await first(items))
        with pytest.raises(EngineDeadError, match="rank 1"):
            await first(items)
        demultiplexer.fail(EngineDeadError("rank 1 died"))
        assert (await inbox.get()).token_ids == [1]
        with pytest.raises(EngineDeadError):
            await inbox.get()

    asyncio.run(run())


def test_an_ingress_without_tokens_hears_of_the_load() -> None:
    async def run() -> None:
        fanout = Fanout(asyncio.get_running_loop(), LOAD)
        items = fanout.open("a").items()
        assert decode_item(await first(items)).load == LOAD
        busy = EngineLoad(5, 6, 7, 1, 10, steps=4, step_seconds=0.02)
        fanout.publish(StepOutput([], busy))
        assert decode_item(await first(items)).load == busy

    asyncio.run(run())


@given(st.lists(st.tuples(st.sets(st.integers(0, 5)), st.booleans(), st.booleans()), max_size=30))
@settings(deadline=None, max_examples=60)
def test_readers_know_what_is_cached_whenever_they_join_and_however_slowly_they_read(
    script: list[tuple[set[int], bool, bool]],
) -> None:
    """Each step changes the state of some hashes; then the one reader reads or doesn't, and another may join."""

    async def run() -> None:
        fanout = Fanout(asyncio.get_running_loop(), LOAD)
        cached: set[bytes] = set()
        streams = [fanout.open("0").items()]
        known: list[set[bytes]] = [set()]
        for number, (changed, reads, joins) in enumerate(script):
            hashes = {bytes([value]) for value in changed}
            fanout.publish(StepOutput([], LOAD, cached=sorted(hashes - cached), evicted=sorted(hashes & cached)))
            cached ^= hashes
            await settle()
            if reads:
                for stream, knows in zip(streams, known, strict=True):
                    item = decode_item(await first(stream))
                    knows |= set(item.cached)
                    knows -= set(item.evicted)
                    assert knows == cached
            if joins:
                streams.append(fanout.open(str(number + 1)).items())
                known.append(set())

    asyncio.run(run())


def test_what_is_under_way_are_requests_that_want_tokens_and_who_asked_for_them() -> None:
    async def run() -> None:
        fanout = Fanout(asyncio.get_running_loop(), LOAD)
        stays, goes = fanout.open("stays"), fanout.open("goes")
        fanout.claim("stays", [request("a"), request("b")])
        fanout.claim("goes", [request("c")])
        names = ["stays", "goes", "a", "b", "c", "never seen"]
        assert fanout.under_way(names) == ["stays", "goes", "a", "b", "c"]
        fanout.leave("goes", goes)
        assert fanout.under_way(names) == ["stays", "a", "b"]
        fanout.publish(StepOutput([token("a", 1, last=True), token("b", 1)], {}, LOAD))
        await settle()
        assert fanout.under_way(names) == ["stays", "b"]
        fanout.release(["b"])
        assert fanout.under_way(names) == []
        stays.close()

    asyncio.run(run())
