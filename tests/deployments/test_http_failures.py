"""What a client sees over HTTP while engines are absent, lost or replaced: an answer, or when to come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import ray
from conftest import TINY, Processes, application_args
from ray import serve
from ray.util import list_named_actors

from benchmarks.steady_load import Load, questions
from deployments.app import build

ROLLED = "rolled"
POOL = {"replicas": {"min": 0, "max": 1}, "autoscaling": {"metrics_interval_s": 0.5, "look_back_period_s": 2.0}}
HEALTH = {"check_period_s": 1.0, "drain_timeout_s": 60.0}
QUESTION = {"prompt": [5, 100, 30, 40], "max_tokens": 400, "temperature": 0, "ignore_eos": True}


@contextmanager
def served(url: str, name: str, pool: dict[str, Any], **more: Any) -> Iterator[str]:
    """A whole application, with one pool of its name; gives its URL."""
    deploy(name, pool, **more)
    try:
        yield f"{url}/{name}"
    finally:
        serve.delete(name)


def deploy(name: str, pool: dict[str, Any], **more: Any) -> None:
    args = application_args(TINY, [{"name": name, **pool}], served_model_name=name, **more)
    serve.run(build(args), name=name, route_prefix=f"/{name}")


def complete(url: str, *, stream: bool = False) -> httpx.Response:
    name = url.rpartition("/")[2]
    return httpx.post(f"{url}/v1/completions", json={"model": name, "stream": stream, **QUESTION}, timeout=240)


def check_refusal(response: httpx.Response, code: str, message: str) -> None:
    """An error as OpenAI has it, before anything was streamed, that says when to come back."""
    error = response.json()["error"]
    assert error["code"] == code
    assert message in error["message"]
    assert int(response.headers["retry-after"]) >= 1


def test_without_an_engine_requests_wait_in_bounds_and_are_told_when_to_come_back(ray_cluster: str) -> None:
    """No node has what the pool asks for. Two may wait for it, a third may not."""
    pool = {"replicas": {"min": 0, "max": 1}, "resources": {"nowhere": 1}}
    with served(ray_cluster, "absent", pool, failover={"max_held": 2, "hold_s": 3.0}) as url:
        with ThreadPoolExecutor(3) as clients:
            answers = list(clients.map(lambda stream: complete(url, stream=stream), [False, True, False]))
        answers.sort(key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in answers] == [429, 503, 503]
        check_refusal(answers[0], "rate_limit_exceeded", "2 requests wait for one already")
        for answer in answers[1:]:
            check_refusal(answer, "engine_unavailable", "no engine came up within 3 s; send the request again later")
            assert answer.elapsed.total_seconds() >= 3


@pytest.fixture(scope="module")
def rolled(ray_cluster: str) -> Iterator[str]:
    """Scaled to zero at first."""
    with served(ray_cluster, ROLLED, POOL, health=HEALTH) as url:
        yield url


def test_a_request_is_held_until_there_is_an_engine(rolled: str, processes_of: Callable[[str], Processes]) -> None:
    assert processes_of(ROLLED).pids == {}
    answer = complete(rolled)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == QUESTION["max_tokens"]


def test_serve_counts_no_request_that_has_ended(rolled: str) -> None:
    """What it counts is what an engine waits for when it drains, and what autoscaling goes by."""
    assert complete(rolled).status_code == 200  # long enough for a lease
    (name,) = [actor for actor in list_named_actors(all_namespaces=True) if f"EngineReplica-{ROLLED}#" in actor["name"]]
    replica = ray.get_actor(name["name"], name["namespace"])
    deadline = time.monotonic() + 10
    while ray.get(replica.get_num_ongoing_requests.remote(), timeout=60):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "changed", [{"max_num_seqs": 8}, {"max_num_seqs": 6, "max_model_len": 384}], ids=["engines", "engines and ingress"]
)
def test_an_update_loses_and_alters_no_request(
    rolled: str, processes_of: Callable[[str], Processes], changed: dict[str, Any]
) -> None:
    """The one engine is replaced while requests are under way: there is none for a while, and the ingress may go too.

    Those of the first update have all the time to finish what they began; those of the second, which were started with
    another drain time, not nearly.
    """
    load = Load(rolled, questions(ROLLED, 8, tokens=240), clients=6)
    load.learn()
    before = processes_of(ROLLED)
    load.start()
    try:
        deploy(ROLLED, {**POOL, "engine": changed}, health={**HEALTH, "drain_timeout_s": 1.0})
        # Requests are short, so engines end long before they would have to.
        assert before.alive_after(20.0) == []
        served_before = load.served
    finally:
        load.stop()
        before.close()
    assert load.failures == []
    assert load.served > served_before
