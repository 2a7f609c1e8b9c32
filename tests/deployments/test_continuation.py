"""Requests that lose engines on their way: what their clients get is what one engine alone would have given."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.client import ClientOptions, EngineClient
from deployments.config import FailoverConfig
from deployments.connection import EngineConnection
from deployments.continuation import Continuation, PromptHashes
from deployments.directory import EngineAddress, ModelInfo, PoolInfo
from deployments.mailbox import Inbox
from deployments.observer import Observer
from deployments.routing import Choice, Replica, RoutingOptions
from deployments.token_stream import Demultiplexer
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.messages import EngineRequest, FinishReason, TokenDelta, TokenLogprobs
from engine.sampling_params import SamplingParams

REQUEST = EngineRequest("r", [1, 2, 3], SamplingParams(seed=0), 20)
ADDRESS = EngineAddress(
    spec=Replica("e", "cpu", 64, 16, 100, 8, 64),
    model_path="",
    identity="",
    actor_name="",
    namespace="",
    stalled_after_s=60,
    start_seconds=7.0,
)


def true_token(position: int) -> int:
    return 100 + position * position % 89


class MortalEngine(EngineConnection):
    """An engine that dies after so many tokens of a request; a token depends only on its position."""

    def __init__(self, lives_for: int) -> None:
        self.address = ADDRESS
        self.retired = False
        self.lives_for = lives_for
        self.requests: list[EngineRequest] = []
        self.closed: list[tuple[str, bool]] = []

    def submit(self, request: EngineRequest) -> Inbox:
        self.requests.append(request)
        inbox = Demultiplexer(lambda item: None).open(request.request_id)
        given = len(request.output_token_ids)
        for index in range(given, min(given + self.lives_for, request.max_tokens)):
            token = true_token(index)
            inbox.put(
                TokenDelta(
                    request.request_id,
                    [token],
                    FinishReason.LENGTH if index + 1 == request.max_tokens else None,
                    logprobs=[TokenLogprobs(token, -0.1, 1)],
                    num_cached_tokens=given,
                    prompt_logprobs=[None] if index == given else None,
                )
            )
        if given + self.lives_for < request.max_tokens:
            inbox.fail(EngineDeadError(f"lived for {self.lives_for} tokens"))
        return inbox

    def finish(self, request_id: str, *, abort: bool) -> None:
        self.closed.append((request_id, abort))


class Counting(Observer):
    def __init__(self) -> None:
        self.events: list[str] = []

    def routed(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("routed")

    def failed_over(self, engine: EngineAddress) -> None:
        self.events.append("failed_over")

    def first_token(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("first_token")

    def finished(self, *args: Any, reason: str, tokens: int, **kwargs: Any) -> None:
        self.events.append(f"finished {reason} {tokens}")


class Client(EngineClient):
    """Goes from one given engine to the next."""

    def __init__(
        self,
        engines: list[MortalEngine],
        *,
        max_losses: int = 100,
        max_losses_in_all: int = 100,
        observer: Observer | None = None,
    ) -> None:
        options = ClientOptions(
            info=ModelInfo("", "", 64, 0),
            identity=None,
            pools=(PoolInfo("cpu", 64, on_demand=False),),
            routing=RoutingOptions(),
            failover=FailoverConfig(max_losses=max_losses, max_losses_in_all=max_losses_in_all),
        )
        super().__init__({}, options, observer=observer)
        self.engines_left = engines

    async def _place(self, run: Continuation, lost: EngineConnection | None) -> tuple[Choice, EngineConnection]:
        return Choice("e", "cpu", 0.1, 0.01, 0, 1), self.engines_left.pop(0)


async def read(client: EngineClient, request: EngineRequest = REQUEST) -> list[TokenDelta]:
    return [delta async for delta in client.generate(request)]


@given(st.lists(st.integers(0, 12), max_size=8))
@settings(deadline=None)
def test_no_token_is_lost_or_repeated(lives: list[int]) -> None:
    engines = [MortalEngine(life) for life in [*lives, 1000]]
    observer = Counting()
    deltas = asyncio.run(read(Client(list(engines), observer=observer)))
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == [true_token(i) for i in range(REQUEST.max_tokens)]
    assert [entry.token_id for delta in deltas for entry in delta.logprobs or []] == tokens
    assert sum(delta.prompt_logprobs is not None for delta in deltas) == 1
    assert {delta.request_id for delta in deltas} == {"r"}
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    ids = [request.request_id for engine in engines for request in engine.requests]
    assert len(set(ids)) == len(ids)
    assert all(len(engine.closed) == len(engine.requests) for engine in engines)
    assert observer.events.count("failed_over") == len(ids) - 1
    assert observer.events.count("first_token") == 1
    assert observer.events[-1] == "finished length 20"


@pytest.mark.parametrize(
    ("lives", "given_up_after"),
    [([0] * 5, 3), ([4, 0, 0, 0], 3), ([0, 0, 4, 0, 0, 0], 5), ([1] * 9, 6)],
    ids=["at once", "after tokens", "suspected, cleared, suspected", "a token from each"],
)
def test_a_request_that_brings_engines_down_is_given_up(lives: list[int], given_up_after: int) -> None:
    """At most two in a row without a token, and five in all."""
    client = Client([MortalEngine(life) for life in lives], max_losses=2, max_losses_in_all=5)
    with pytest.raises(EngineDeadError, match=r"\d engine\(s\) were lost .* it may be what brings them down"):
        asyncio.run(read(client))
    assert len(lives) - len(client.engines_left) == given_up_after


def test_engines_that_drain_are_no_losses() -> None:
    engines = [MortalEngine(5) for _ in range(4)]
    for engine in engines:
        engine.retired = True
    assert len(asyncio.run(read(Client(engines, max_losses=0)))) == 4


def test_a_request_that_is_refused_does_not_go_elsewhere() -> None:
    class Refusing(MortalEngine):
        def submit(self, request: EngineRequest) -> Inbox:
            inbox = Inbox()
            inbox.fail(RequestError("no such token"))
            return inbox

    client = Client([Refusing(1), MortalEngine(100)])
    with pytest.raises(RequestError):
        asyncio.run(read(client))
    assert len(client.engines_left) == 1


def test_a_client_that_leaves_aborts() -> None:
    async def run() -> list[str]:
        observer = Counting()
        engine = MortalEngine(3)
        stream = Client([engine], observer=observer).generate(REQUEST)
        await anext(stream)
        await stream.aclose()
        assert engine.closed == [("r", True)]
        return observer.events

    assert asyncio.run(run())[-1] == "finished abort 3"


def test_the_job_of_a_continued_request_has_its_tokens() -> None:
    run = Continuation(replace(REQUEST, prompt_token_ids=list(range(32))))
    first = run.job([16], admitted=False)
    assert (first.prompt_tokens, first.max_tokens, len(first.block_hashes[16]), first.priority) == (32, 20, 2, 0)
    hashes = list(first.block_hashes[16])
    run.next_attempt()
    run.accept(TokenDelta("r", list(range(17))))
    second = run.job([16], admitted=True)
    assert (second.prompt_tokens, second.max_tokens, second.priority) == (49, 3, -1)
    assert list(second.block_hashes[16])[:2] == hashes
    assert len(second.block_hashes[16]) == 3


def test_the_choices_of_a_prompt_share_its_hashes_until_they_have_tokens() -> None:
    """While a long prompt was hashed for each of 128 choices, no other stream would go on."""
    prompts = PromptHashes()
    request = replace(REQUEST, prompt_token_ids=list(range(32)))
    first, second = Continuation(request, prompts), Continuation(replace(request, request_id="s"), prompts)
    shared = first.job([16], admitted=False).block_hashes[16]
    assert second.job([16], admitted=False).block_hashes[16] is shared
    first.next_attempt()
    first.accept(TokenDelta("r", list(range(16))))
    assert first.job([16], admitted=True).block_hashes[16][:2] == shared
    assert len(first.job([16], admitted=True).block_hashes[16]) == 3
    assert len(shared) == 2
    other = Continuation(replace(request, prompt_token_ids=list(range(1, 33))), prompts)
    assert other.job([16], admitted=False).block_hashes[16] != shared


class Moving(Client):
    """As :class:`Client`, with a router that knows of every engine."""

    async def _place(self, run: Continuation, lost: EngineConnection | None) -> tuple[Choice, EngineConnection]:
        return self._router.choose(run.job([], admitted=True), now=0.0), self.engines_left.pop(0)


def test_the_router_hears_of_the_first_token_from_every_engine() -> None:
    """Until then it takes the whole prompt to be waiting there, and predicts accordingly for everybody else."""

    async def run() -> None:
        client = Moving([MortalEngine(3), MortalEngine(100)])
        client._router.add(ADDRESS.spec)
        async for delta in client.generate(REQUEST):
            assert delta.token_ids
            assert not client._router._places["e"].waiting
        assert client._router.reserved == 0

    asyncio.run(run())


class Nobody(EngineClient):
    """Has pools, and no engine in any."""

    def __init__(self, *, max_held: int) -> None:
        options = ClientOptions(
            info=ModelInfo("", "", 64, 0),
            identity=None,
            pools=(PoolInfo("cpu", 64, on_demand=False),),
            routing=RoutingOptions(),
            failover=FailoverConfig(hold_s=0.2, max_held=max_held),
        )
        super().__init__({}, options)


def test_requests_are_held_in_bounds_and_told_when_to_come_back() -> None:
    async def run() -> None:
        client = Nobody(max_held=2)
        held = [asyncio.create_task(read(client)) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert client.held == 2
        with pytest.raises(OverloadedError) as refused:
            await read(client)
        assert refused.value.retry_after_s >= 1
        results = await asyncio.gather(*held, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) and result.retry_after_s for result in results)
        assert client.held == 0

    asyncio.run(run())
