"""The door of the server: who gets in, and what it answers to the others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from door import CANARY, CHAT, MODEL, Door, Failing, check, reload, run
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import OverloadedError
from engine.tokenizer import Tokenizer
from tests.fuzz.asgi import JSON


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MODEL)


@pytest.fixture
def door(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Door]:
    return lambda **options: Door(tmp_path, tokenizer, **options)


def test_keys(door: Callable[..., Door]) -> None:
    here = door()
    expired = here.add("old", expires=datetime.now(UTC) - timedelta(seconds=1))
    elsewhere = here.add("elsewhere", models=("other-*",))
    monitor = here.add("monitor", models=())

    async def scenario() -> None:
        refused = await here.ask(expired)
        check(refused, 401, "invalid_api_key")  # not read yet
        await reload(here)
        assert (await here.ask(here.admin)).status == 200
        assert (await here.ask(here.admin, "/v1/models", method="GET")).status == 200
        for wrong in (None, "", "x", here.admin[:-1], here.admin + "x", "sk-dibit-\xff", "é" * 500):
            answer = await here.ask(wrong)
            check(answer, 401, "invalid_api_key")
            assert answer.header("www-authenticate") == "Bearer"
        assert "expired" in check(await here.ask(expired), 401, "invalid_api_key")
        for path, method in ((CHAT, "POST"), ("/v1/models", "GET"), ("/tokenize", "POST"), ("/v1/nothing", "GET")):
            for key in (elsewhere, monitor):
                check(await here.ask(key, path, method=method), 403, "insufficient_permissions")
        assert (await here.ask(monitor, "/openapi.json", method="GET")).status == 200
        assert (await here.ask(None, "/health", method="GET")).status == 200
        for path in ("/openapi.json", "/v1/models", "/nothing", "/health/", "//health", "/health/../v1/models", "/"):
            check(await here.ask(None, path, method="GET"), 401)
        twice = [(b"authorization", f"Bearer {here.admin}".encode())]
        check(await here.ask(here.admin, headers=twice), 401)
        for scheme in ("Basic", "", "bearer bearer"):
            headers = [(b"authorization", f"{scheme} {here.admin}".encode())]
            check(await here.ask(None, headers=headers), 401)
        lower = [(b"authorization", f"bearer {here.admin}".encode())]
        assert (await here.ask(None, headers=lower)).status == 200

    run(scenario())
    assert here.engine.running == 0
    assert set(here.observer.reasons) == {"unauthorized", "forbidden"}


def test_a_running_server_watches_the_file(door: Callable[..., Door]) -> None:
    here = door(reload_seconds=0.01)
    new = here.add("new")

    async def scenario() -> None:
        async with here.app.router.lifespan_context(here.app):
            while (await here.ask(new)).status != 200:
                await asyncio.sleep(0.01)

    run(scenario())


def test_keys_change_while_requests_go_on(door: Callable[..., Door]) -> None:
    here = door()

    async def scenario() -> None:
        here.engine.open.clear()
        waiting = asyncio.create_task(here.ask(here.admin))
        while not here.engine.running:
            await asyncio.sleep(0)
        new, _ = here.keys.rotate(here.keys.list()[0].id, now=datetime.now(UTC), old_until=datetime.now(UTC))
        await reload(here)
        here.engine.open.set()
        assert (await waiting).status == 200, "who is in stays in"
        check(await here.ask(here.admin), 401, "invalid_api_key")
        assert (await here.ask(new)).status == 200
        here.keys.revoke(here.keys.list()[1].id, now=datetime.now(UTC))
        await reload(here)
        assert "revoked" in check(await here.ask(new), 401)

    run(scenario())


def test_limits_of_a_key(door: Callable[..., Door]) -> None:
    here = door()
    slow = here.add("slow", requests_per_minute=2)
    thrifty = here.add("thrifty", tokens_per_minute=100)
    single = here.add("single", max_concurrent=1)

    async def scenario() -> None:
        await reload(here)
        for left in (b"1", b"0"):
            answer = await here.ask(slow)
            assert answer.status == 200
            fields = dict(answer.headers)
            assert fields[b"x-ratelimit-limit-requests"] == b"2"
            assert fields[b"x-ratelimit-remaining-requests"] == left
        refused = await here.ask(slow, fields={"stream": True})
        assert "'slow'" in check(refused, 429, "rate_limit_exceeded")
        assert 25 <= int(refused.header("retry-after") or 0) <= 30
        assert refused.header("x-ratelimit-remaining-requests") == "0"
        assert (await here.ask(slow, "/v1/models", method="GET")).status == 200, "looking is free"

        answer = await here.ask(thrifty)
        assert answer.status == 200
        usage = json.loads(answer.body)["usage"]
        after = await here.ask(thrifty, "/v1/models", method="GET")
        assert int(after.header("x-ratelimit-remaining-tokens") or -1) == 100 - usage["total_tokens"]
        long = {"messages": [{"role": "user", "content": "word " * 150}]}
        check(await here.ask(thrifty, fields=long), 400, "tokens_exceed_limit")

        here.engine.open.clear()
        first = asyncio.create_task(here.ask(single, fields={"stream": True}))
        while not here.engine.running:
            await asyncio.sleep(0)
        check(await here.ask(single), 429, "rate_limit_exceeded")
        here.engine.open.set()
        assert (await first).status == 200
        assert (await here.ask(single)).status == 200

    run(scenario())
    assert here.observer.reasons.count("rate_limit") == 3, "the prompt that never fits among them"


def test_a_client_that_leaves_gives_its_place_back(door: Callable[..., Door]) -> None:
    here = door(max_requests_in_flight=1)

    async def scenario() -> None:
        for stream in (False, True):
            here.engine.open.clear()
            leave = asyncio.Event()
            gone = asyncio.create_task(here.ask(here.admin, fields={"stream": stream}, leave_after=leave))
            while not here.engine.running:
                await asyncio.sleep(0)
            check(await here.ask(here.admin), 429)
            leave.set()
            await asyncio.wait((gone,))
            here.engine.open.set()
            assert (await here.ask(here.admin)).status == 200

    run(scenario())
    statuses = [(line["status"], line.get("aborted", False)) for line in here.lines()]
    assert statuses == [(429, False), (499, True), (200, False)] * 2


def test_a_slow_or_large_body_and_a_long_prompt(door: Callable[..., Door]) -> None:
    here = door(max_body_bytes=1000, body_timeout_s=0.05, max_prompt_tokens=20, max_requests_in_flight=1)

    async def scenario() -> None:
        check(await here.ask(here.admin, body=b"x" * 1001), 413)
        check(await here.ask(here.admin, body=b"x" * 1001, pieces=7), 413)
        long = {"messages": [{"role": "user", "content": "word " * 30}]}
        check(await here.ask(here.admin, fields=long), 400, "context_length_exceeded")

        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [JSON, (b"authorization", f"Bearer {here.admin}".encode())]
        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "root_path": "",
            "headers": headers,
            "query_string": b"",
        }
        await here.app(scope, receive, send)
        assert sent[0]["status"] == 408
        assert (await here.ask(here.admin)).status == 200

    run(scenario())


def test_request_ids(door: Callable[..., Door]) -> None:
    here = door()
    good = "req-1.2:3_4"

    async def scenario() -> None:
        assert (await here.ask(here.admin, headers=[(b"x-request-id", good.encode())])).header("x-request-id") == good
        for bad in (b"", b"a b", b'"},{"', b"\xff", b"x" * 129, CANARY.encode() + b"\x7f"):
            given = (await here.ask(here.admin, headers=[(b"x-request-id", bad)])).header("x-request-id")
            assert given is not None
            assert given.isalnum()
        assert (await here.ask(None)).header("x-request-id")

    run(scenario())
    ids = [line["request_id"] for line in here.lines()]
    assert ids[0] == good
    assert len(set(ids)) == len(ids)


def test_behind_serve_the_id_is_serves(door: Callable[..., Door]) -> None:
    here = door(app={"answer_request_id": False})

    async def scenario() -> None:
        assert (await here.ask(here.admin, headers=[(b"x-request-id", b"mine")])).header("x-request-id") is None

    run(scenario())
    assert here.lines()[0]["request_id"] == "mine"


def test_processes_share_the_limits_of_a_key(door: Callable[..., Door]) -> None:
    processes = 1
    here = door(app={"processes": lambda: processes})
    key = here.add("a", requests_per_minute=100)

    async def scenario() -> None:
        nonlocal processes
        await reload(here)
        assert (await here.ask(key)).header("x-ratelimit-limit-requests") == "100"
        processes = 4
        await reload(here)
        assert (await here.ask(key)).header("x-ratelimit-limit-requests") == "25"

    run(scenario())


def test_routes_beside_the_api(door: Callable[..., Door]) -> None:
    async def page(_: Request) -> Response:
        return Response("page")

    routes = [Route("/", page), Route("/metrics", page)]
    here = door(app={"routes": routes, "public_paths": ["/"]})

    async def scenario() -> None:
        assert (await here.ask(None, "/", method="GET")).status == 200
        check(await here.ask(None, "/metrics", method="GET"), 401)
        check(await here.ask(None, "/", method="POST"), 405)

    run(scenario())


def test_other_origins(door: Callable[..., Door]) -> None:
    page = "https://chat.example.com"
    ask = [(b"access-control-request-method", b"POST"), (b"access-control-request-headers", b"authorization")]

    async def scenario(here: Door, allowed: bool) -> None:
        for origin in (page, "https://evil.example.com"):
            headers = [(b"origin", origin.encode())]
            yes = origin if allowed and origin == page else None
            preflight = await here.ask(None, method="OPTIONS", headers=[*headers, *ask])
            assert preflight.header("access-control-allow-origin") == yes
            for key in (here.admin, None):
                answer = await here.ask(key, headers=headers)
                assert answer.header("access-control-allow-origin") == yes
                assert yes is None or "x-request-id" in (answer.header("access-control-expose-headers") or "")

    run(scenario(door(), False))
    run(scenario(door(cors_origins=(page,)), True))


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_router_refuses_is_a_429(door: Callable[..., Door], tokenizer: Tokenizer, stream: bool) -> None:
    refusing = Failing(OverloadedError("all engines are full", retry_after_s=2.5), tokenizer.used_vocab_size)
    here = door(engine=refusing)

    async def scenario() -> None:
        answer = await here.ask(here.admin, fields={"stream": stream})
        assert "full" in check(answer, 429, "rate_limit_exceeded")
        assert (answer.header("retry-after"), answer.header("retry-after-ms")) == ("3", "2500")

    run(scenario())


def test_no_websocket_gets_past_the_keys(door: Callable[..., Door]) -> None:
    here = door()
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    run(here.app({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
