"""The official client against a real ``serve run``: a planned engine, two ranks, and nothing left after Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from benchmarks.serve_process import ServeProcess

MODEL = Path(__file__).resolve().parents[2] / "examples" / "ernie-tiny" / "2bits"
NAME = MODEL.name
MESSAGES = [{"role": "user", "content": "Tell me a story about a little dog."}]
LONG = {"ignore_eos": True}


def planned() -> dict[str, Any]:
    """The application as ``dibit plan`` writes it for a GPU; where there is none its engine takes the CPU."""
    command = [sys.executable, "-m", "deployments.cli", "plan", str(MODEL), "--context", "512", "--gpu", "A100-80G"]
    written = subprocess.run([*command, "--emit", "serve-config"], capture_output=True, check=True, text=True)
    (application,) = yaml.safe_load(written.stdout)["applications"]
    return application["args"]


@pytest.fixture(scope="module", params=["planned", "tp2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    tp2 = {
        "model": str(MODEL),
        "engine": {"max_model_len": 512, "max_num_seqs": 16, "num_threads": 1},
        "pools": [{"name": "cpu", "tensor_parallel_size": 2}],
    }
    args = planned() if request.param == "planned" else tp2
    # A node as Ray sees one with such a GPU.
    environment = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 4, "GPU": 1, "accelerator_type:A100": 1})}
    with ServeProcess(args, tmp_path_factory.mktemp("serve"), environment=environment) as process:
        yield process
        # A client in the middle of a stream must not keep the server from ending.
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model=NAME, prompt="Once", max_tokens=3, stream=True)
            next(stream)
            assert process.stop() == 0, process.tail()
    deadline = time.monotonic() + 20
    while remaining := process.processes():
        assert time.monotonic() < deadline, remaining
        time.sleep(0.1)  # processes that are ending give no signal to one that is not their parent


@pytest.fixture(scope="module")
def client(served: ServeProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [NAME]


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 40, "seed": 5, "extra_body": LONG}
    whole = client.chat.completions.create(**options)
    assert whole.usage.completion_tokens == 40
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 40


def test_tokens_come_one_by_one(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=80, stream=True, extra_body=LONG)
    times = [time.monotonic() for _ in stream]
    assert len(times) > 20
    assert times[len(times) // 2] - times[0] > 0.2 * (times[-1] - times[0])


def test_many_clients_at_once(served: ServeProcess) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model=NAME, prompt="Once upon a time", max_tokens=20, seed=seed, stream=True, extra_body=LONG
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*[ask(client, seed) for seed in range(32)])
            assert len(set(together)) > 16
            assert await ask(client, 7) == together[7]

    asyncio.run(run())


def test_completions_with_logprobs_and_stop(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": ["Once upon", "The cat"], "max_tokens": 30, "temperature": 0}
    answer = client.completions.create(**options, n=2, logprobs=2, extra_body=LONG)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.tokens) == 30 for choice in answer.choices)
    text = answer.choices[0].text
    stopped = client.completions.create(**options, stop=text[10:14], extra_body=LONG).choices[0]
    assert stopped.text == text[: text.index(text[10:14])]
    assert stopped.finish_reason == "stop"


def test_mistakes_are_told_as_openai_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="word " * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_clients_that_leave_make_room(served: ServeProcess, client: openai.OpenAI) -> None:
    """More long streams than the engine runs at once, all left after a token; then a short one is served soon."""

    def leave(seed: int) -> None:
        with client.completions.create(
            model=NAME, prompt="Once", max_tokens=500, seed=seed, stream=True, extra_body=LONG
        ) as stream:
            next(stream)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(leave, range(32)))
    started = time.monotonic()
    assert client.completions.create(model=NAME, prompt="Once", max_tokens=2).choices
    assert time.monotonic() - started < 10
