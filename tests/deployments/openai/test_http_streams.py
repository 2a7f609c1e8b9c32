"""Streams as bytes: their form, clients that leave, engines that die, health."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable

import httpx
import openai
import pytest
from http_server import NAME, Server, events

pytest_plugins = ("http_fixtures",)

LONG = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 240, "ignore_eos": True}


def raw_request(server: Server, body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


def test_a_stream_on_the_wire(http: httpx.Client) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "stream": True}
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    for chunk in chunks:
        assert chunk.keys() == {"id", "created", "model", "object", "choices"}
        assert chunk["choices"][0].keys() - {"stop_reason"} == {"index", "delta", "logprobs", "finish_reason"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_models(http: httpx.Client, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert client.models.retrieve(NAME).created == model.created
    response = http.get("/v1/models/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_health_is_that_of_the_engine(http: httpx.Client, make_server: Callable[..., Server]) -> None:
    assert http.get("/health").status_code == 200
    server = make_server(num_kv_blocks=32)
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.executor.broken.set()
    failed = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=30)
    assert failed.status_code == 503
    assert failed.json()["error"]["type"] == "server_error"
    assert httpx.get(f"{server.url}/health").status_code == 503
    again = httpx.post(f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=30)
    assert again.status_code == 503


def test_an_engine_that_dies_mid_stream_ends_it_with_an_error(make_server: Callable[..., Server]) -> None:
    server = make_server(num_kv_blocks=32)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        stream = client.completions.create(
            model=NAME, prompt="Once", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
        )
        assert next(stream).choices[0].text
        server.executor.broken.set()
        with pytest.raises(openai.APIError, match="engine"):
            list(stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_blocks(server: Server, stream: bool, n: int) -> None:
    server.wait_until_idle()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(raw_request(server, {**LONG, "stream": stream, "n": n}))
        if stream:
            assert b" 200 " in connection.recv(1000)
        else:
            busy = threading.Event()
            while not server.engine.load.running_requests:
                assert not busy.wait(0.005)
    server.wait_until_idle(1.0)


def test_200_clients_that_vanish_leave_nothing(server: Server, http: httpx.Client) -> None:
    async def vanish(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw_request(server, {**LONG, "stream": number % 2 == 0, "prompt": f"Number {number} was"}))
        await writer.drain()
        if number % 4 == 0:
            await reader.read(10)
        writer.transport.abort()

    async def run() -> None:
        await asyncio.gather(*[vanish(number) for number in range(200)])

    asyncio.run(run())
    server.wait_until_idle(10.0)
    assert http.get("/health").status_code == 200
    answer = http.post("/v1/completions", json={**LONG, "max_tokens": 4})
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_a_request_cut_off_before_its_end_is_forgotten(server: Server, http: httpx.Client) -> None:
    request = raw_request(server, LONG)
    for length in (20, len(request) - 5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(request[:length])
    assert http.get("/health").status_code == 200
    server.wait_until_idle()


def test_a_slow_reader_gets_everything(server: Server, http: httpx.Client) -> None:
    """Deltas that pile up while a client doesn't read are joined, not lost."""
    body = {**LONG, "max_tokens": 80, "seed": 6, "n": 2}
    whole = http.post("/v1/completions", json=body).json()
    texts = ["", ""]
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        first = next(lines)
        server.wait_until_idle(30)  # the engine is done before the second line is read
        for line in [first, *lines]:
            if line and line != "data: [DONE]":
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_closing_the_server_ends_streams(make_server: Callable[..., Server]) -> None:
    server = make_server(num_kv_blocks=32)
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=30) as response:
        assert next(response.iter_bytes())
    server.wait_until_idle()
