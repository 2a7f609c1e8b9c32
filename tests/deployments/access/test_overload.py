"""Ten times what fits: who is in is served, the rest is told when to come back, and then all is as it was."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from deployments.access.config import AccessConfig
from deployments.local import LocalEngine
from deployments.openai.app import create_app
from engine.config import EngineConfig
from engine.tokenizer import Tokenizer
from tests.fuzz.asgi import JSON, Answer, call
from tests.fuzz.synthetic import SyntheticEngine

MODEL = Path(__file__).resolve().parents[3] / "examples" / "ernie-tiny" / "bf16"
CAPACITY = 10


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MODEL)


def make_app(engine: Any, tokenizer: Tokenizer) -> Starlette:
    access = AccessConfig(log="off", max_requests_in_flight=CAPACITY)
    return create_app(engine, tokenizer=tokenizer, access=access)


def ask(app: Starlette, *, stream: bool) -> asyncio.Task[Answer]:
    fields = {"prompt": "Once upon a time", "max_tokens": 4, "stream": stream, "temperature": 0}
    return asyncio.ensure_future(call(app, "POST", "/v1/completions", headers=[JSON], body=json.dumps(fields).encode()))


def check_refusals(refused: list[Answer]) -> None:
    """A status of their own before anything was streamed, and moments to come back that are not all the same."""
    waits = []
    for answer in refused:
        assert answer.status == 429
        error = json.loads(answer.body)["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert 1 <= int(answer.header("retry-after") or 0) <= 60
        waits.append(int(answer.header("retry-after-ms") or 0))
    assert len(set(waits)) > len(waits) // 4


def text_of(streamed: Answer) -> str:
    """What the chunks of a stream say together."""
    chunks = [line.removeprefix(b"data: ") for line in streamed.body.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in json.loads(chunk)["choices"])


@pytest.mark.parametrize("stream", [False, True])
def test_who_is_in_is_served(tokenizer: Tokenizer, stream: bool) -> None:
    engine = SyntheticEngine(vocab_size=tokenizer.used_vocab_size)
    app = make_app(engine, tokenizer)

    async def wave() -> None:
        engine.open.clear()
        tasks = [ask(app, stream=stream) for _ in range(10 * CAPACITY)]
        refused = []
        for done in asyncio.as_completed(tasks):
            refused.append(await done)
            if len(refused) == 9 * CAPACITY:
                break  # while those who are in have not had a token
        check_refusals(refused)
        assert (await call(app, "GET", "/health")).status == 200
        assert (await call(app, "GET", "/v1/models")).status == 200
        engine.open.set()
        answers = await asyncio.gather(*tasks)
        served = [answer for answer in answers if answer.status == 200]
        assert len(served) == CAPACITY
        assert all(answer.body.endswith(b"data: [DONE]\n\n") for answer in served if stream)
        assert (await ask(app, stream=stream)).status == 200, "recovery is immediate"

    async def waves() -> list[int]:
        sizes = []
        for _ in range(4):
            await wave()
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
        return sizes

    tracemalloc.start()
    try:
        sizes = asyncio.run(waves())
    finally:
        tracemalloc.stop()
    assert sizes[-1] - sizes[1] < 50_000, f"memory grows with every wave: {sizes}"
    assert engine.most == CAPACITY
    assert engine.running == 0


def test_an_engine_with_a_model(tokenizer: Tokenizer) -> None:
    config = EngineConfig(
        model=str(MODEL), device="cpu", num_threads=1, max_model_len=64, max_num_seqs=4, num_kv_blocks=32
    )

    async def scenario() -> None:
        engine = LocalEngine(config, tokenizer)
        engine.start()
        try:
            app = make_app(engine, tokenizer)
            expected = text_of(await ask(app, stream=True))
            for stream in (False, True):
                answers = await asyncio.gather(*[ask(app, stream=stream) for _ in range(10 * CAPACITY)])
                served = [answer for answer in answers if answer.status == 200]
                assert len(served) >= CAPACITY
                check_refusals([answer for answer in answers if answer.status != 200])
                for answer in served:
                    if stream:
                        assert text_of(answer) == expected
                        assert answer.body.endswith(b"data: [DONE]\n\n")
                    else:
                        assert json.loads(answer.body)["usage"]["completion_tokens"] == 4
                assert (await ask(app, stream=stream)).status == 200
        finally:
            await engine.close()
        assert engine.load.running_requests == 0

    asyncio.run(scenario())
