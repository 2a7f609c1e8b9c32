"""Real Ray processes: what the engines answer through Serve, actors and streams is what the model says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGINE, TINY
from probe import greedy
from ray import serve
from ray.exceptions import RayTaskError

from engine import LLM, SamplingParams
from engine.errors import RequestError

PROMPTS = [[5 + i, 100 + 7 * i, 30, 40 + i] * (1 + i % 4) for i in range(12)]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What the same model answers offline, in this process."""
    with LLM(TINY, progress=False, **ENGINE) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        outputs = llm.generate(PROMPTS, params)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def probe(request: pytest.FixtureRequest, application: Callable[..., Any]) -> Iterator[Any]:
    with application(f"ranks{request.param}", tensor_parallel_size=request.param) as handle:
        yield handle


def test_one_request_answers_as_the_offline_model(probe: Any, expected: list[list[int]]) -> None:
    token_ids, finish_reason = probe.generate.remote(greedy("single", PROMPTS[0], MAX_TOKENS)).result(timeout_s=120)
    assert token_ids == expected[0]
    assert finish_reason == "length"


def test_many_at_once_answer_as_the_offline_model(probe: Any, expected: list[list[int]]) -> None:
    answers = [probe.generate.remote(greedy(f"many-{i}", p, MAX_TOKENS)) for i, p in enumerate(PROMPTS)]
    assert [answer.result(timeout_s=120)[0] for answer in answers] == expected


def test_a_client_that_leaves_frees_its_blocks(probe: Any) -> None:
    probe.until_idle.remote().result(timeout_s=120)
    during, seconds = probe.leave_after_first.remote(greedy("leaver", [9] * 100, 400)).result(timeout_s=120)
    assert during.running_requests == 1
    assert during.free_blocks < during.total_blocks
    assert seconds < 1.0


def test_a_lease_lasts_as_long_as_the_engine_has_what_it_is_for(probe: Any) -> None:
    """Whatever became of the one who opened it: a lease that stays keeps its engine from draining."""
    held = probe.leases.remote(greedy("leased", [9] * 20, 490)).result(timeout_s=120)
    assert list(held.values()) == [True, True, False, False], held


def test_what_the_engine_refuses_is_the_requests_error(probe: Any) -> None:
    with pytest.raises(RayTaskError) as raised:
        probe.generate.remote(greedy("refused", [10**6], 4)).result(timeout_s=120)
    assert isinstance(raised.value.cause, RequestError)
    assert raised.value.cause.field == "prompt"


def test_the_ingress_knows_the_model(probe: Any) -> None:
    info = probe.info.remote().result(timeout_s=120)
    assert (info.model_path, info.served_model_name) == (str(TINY), "bf16")
    assert info.max_model_len == ENGINE["max_model_len"]
    assert probe.healthy.remote().result(timeout_s=120)


def test_requests_of_one_moment_are_spread_over_the_replicas(application: Callable[..., Any]) -> None:
    with application("pair", replicas=2) as probe:
        probe.until_engines.remote(2).result(timeout_s=240)
        requests = [greedy(f"spread-{i}", [3, 4, 5], 200) for i in range(10)]
        assert probe.spread.remote(requests).result(timeout_s=120) == [5, 5]


def test_a_model_that_cannot_be_loaded_is_one_clear_message(application: Callable[..., Any], tmp_path: Path) -> None:
    for file in TINY.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:5000] if file.suffix == ".safetensors" else content)
    with pytest.raises(RuntimeError, match="broken"), application("broken", model=tmp_path, keep_failed=True):
        pass
    message = serve.status().applications["broken"].deployments["EngineReplica-broken"].message
    serve.delete("broken")
    assert re.search(r"CheckpointError.*model\.safetensors", message)
