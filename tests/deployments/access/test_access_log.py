"""What is written down about requests, and what never is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from door import CANARY, CHAT, MODEL, Door, Failing, reload, run

from engine.errors import OverloadedError
from engine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MODEL)


@pytest.fixture
def door(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Door]:
    return lambda **options: Door(tmp_path, tokenizer, **options)


def test_the_log_tells_of_a_request_and_not_of_its_prompt(door: Callable[..., Door]) -> None:
    here = door()

    async def scenario() -> None:
        whole = json.loads((await here.ask(here.admin)).body)
        await here.ask(here.admin, fields={"stream": True, "n": 2})
        await here.ask(None, "/health", method="GET")
        usage = whole["usage"]
        first, second = here.lines()
        assert first["status"] == 200
        assert (first["key"], first["model"], first["route"], first["method"]) == ("admin", "tiny", CHAT, "POST")
        assert (first["prompt_tokens"], first["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert first["ttft_s"] is None
        assert 0 < second["ttft_s"] <= second["duration_s"]
        assert second["prompt_tokens"] == first["prompt_tokens"]
        assert second["output_tokens"] == 8

    run(scenario())
    assert CANARY not in here.log.read_text()


def test_prompts_are_logged_where_the_operator_asks(door: Callable[..., Door]) -> None:
    here = door(log_prompts=True)
    run(_one(here))
    assert CANARY in here.lines()[0]["prompts"][0]
    assert here.admin not in here.log.read_text()


async def _one(here: Door) -> None:
    assert (await here.ask(here.admin)).status == 200


def test_no_secret_reaches_a_log(
    door: Callable[..., Door],
    tokenizer: Tokenizer,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Keys and prompts, right and wrong ones, through every way a request can end."""
    caplog.set_level(logging.DEBUG)
    size = tokenizer.used_vocab_size
    engines: list[Any] = [
        None,
        Failing(RuntimeError("boom"), size),
        Failing(OverloadedError("x", retry_after_s=3), size),
    ]
    for engine in engines:
        here = door(engine=engine, max_body_bytes=2000)
        limited = here.add("limited", requests_per_minute=1)
        wrong = here.admin[:-4] + CANARY

        async def scenario(here: Door = here, limited: str = limited, wrong: str = wrong, engine: Any = engine) -> None:
            await reload(here)
            keys = (here.admin, limited, limited, wrong, f" {here.admin} x", f"{here.admin}\t", None)
            for key in keys if engine is None else keys[:2]:
                value = b"" if key is None else key.encode()
                for headers in (
                    [(b"authorization", b"Bearer " + value)],
                    [(b"authorization", value)],
                    [(b"authorization", b"Basic " + value)],
                    [(b"authorization", b"Bearer " + value + b"\xff\xfe")],
                    [(b"authorization", b"Bearer " + value)] * 2,
                    [(b"api-key", value), (b"x-api-key", value), (b"cookie", value), (b"user-agent", value)],
                    [(b"authorization", b"Bearer " + value), (b"x-request-id", b" " + value)],
                    [(b"authorization", b"Bearer " + value), (b"content-length", value)],
                    [(b"authorization", b"Bearer " + value), (b"origin", value), (b"referer", value)],
                    [(b"authorization", b"Bearer " + value), (b"content-type", value)],
                ):
                    for body in (
                        None,
                        value,
                        b'{"messages":' + value,
                        b"{" + value * 50,
                        b'{"model":"' + value + b'"}',
                    ):
                        await here.ask(None, headers=headers, body=body)
                    await here.ask(None, headers=headers, fields={"stream": True, CANARY: 1, "user": CANARY})
                    for path in ("/" + value.decode(), "/v1/models/" + value.decode(), "/health"):
                        await here.ask(None, path, method="GET", headers=headers, query=b"api_key=" + value)
                        await here.ask(None, path, method="POST", headers=headers)
                    await here.ask(None, method="FROB" + value.decode("latin-1"), headers=headers)

        run(scenario())
        out, err = capfd.readouterr()
        written = here.log.read_text() + caplog.text + out + err
        assert '"status":429' in written
        for secret in (here.admin, here.admin[18:], limited, limited[18:], CANARY):
            assert secret not in written
        caplog.clear()
