"""Processes killed or hung: who notices, who goes along, who comes back, what is left; and that no client notices."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import ENGINE, TINY, Processes, application_args, probed
from probe import greedy, sampled
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from engine import LLM, SamplingParams
from engine.errors import EngineDeadError

POOL = "fragile"
LONG = 400
PROMPT = [1, 2, 3]
STALLED_AFTER_S = 10.0


@pytest.fixture(scope="module")
def probe(application: Callable[..., Any]) -> Iterator[Any]:
    health = {"check_period_s": 1.0, "drain_timeout_s": 30.0, "stalled_after_s": STALLED_AFTER_S}
    with application(POOL, tensor_parallel_size=2, args={"health": health}) as handle:
        yield handle


@pytest.fixture(scope="module")
def undisturbed() -> dict[float, list[int]]:
    """What the model answers when nothing happens, by temperature."""
    answers = {}
    with LLM(TINY, progress=False, **ENGINE) as llm:
        for temperature in (0.0, 1.0):
            params = SamplingParams(temperature=temperature, seed=3, max_tokens=LONG, ignore_eos=True)
            answers[temperature] = list(llm.generate([PROMPT], params)[0].outputs[0].token_ids)
    return answers


@pytest.fixture
def engine(probe: Any, processes_of: Callable[[str], Processes]) -> Iterator[Processes]:
    """The processes of the one engine, which takes requests."""
    probe.until_engines.remote(1).result(timeout_s=240)
    processes = processes_of(POOL)
    assert len(processes.pids) == 3, processes.pids
    yield processes
    processes.close()


def send(processes: Processes, ending: str, what: signal.Signals) -> None:
    (pid,) = [pid for name, pid in processes.pids.items() if name.endswith(ending)]
    os.kill(pid, what)


@pytest.mark.parametrize(("rank", "temperature"), [(0, 0.0), (1, 1.0)], ids=["shard 0, greedy", "shard 1, sampled"])
def test_a_killed_rank_takes_its_replica_along_and_its_requests_go_on(
    probe: Any, engine: Processes, undisturbed: dict[float, list[int]], rank: int, temperature: float
) -> None:
    request = sampled(f"victim-{rank}", PROMPT, LONG, temperature=temperature, seed=3)
    under_way = iter(probe.options(stream=True).stream.remote(request))
    received = [next(under_way)]
    send(engine, f"shard-{rank}", signal.SIGKILL)
    assert engine.alive_after(5.0) == []
    received += under_way
    assert len(received[0].token_ids) < LONG
    assert [token for delta in received for token in delta.token_ids] == undisturbed[temperature]
    assert [entry.token_id for delta in received for entry in delta.logprobs or []] == undisturbed[temperature]
    load = probe.check.remote(POOL).result(timeout_s=60)
    assert load.free_blocks == load.total_blocks


def test_a_hung_engine_is_left_and_really_dies(
    probe: Any, engine: Processes, undisturbed: dict[float, list[int]]
) -> None:
    """A stopped process answers nothing, and does not end by itself."""
    under_way = iter(probe.options(stream=True).stream.remote(greedy("stuck", PROMPT, LONG)))
    received = [next(under_way)]
    send(engine, "shard-1", signal.SIGSTOP)
    received += under_way
    assert [token for delta in received for token in delta.token_ids] == undisturbed[0.0]
    assert engine.alive_after(20.0) == []


def test_a_killed_replica_takes_its_ranks_along(probe: Any, engine: Processes) -> None:
    (replica,) = [name for name in engine.pids if "EngineReplica" in name]
    os.kill(engine.pids[replica], signal.SIGKILL)
    assert engine.alive_after(5.0) == []


def test_a_killed_ingress_leaves_no_request_behind(probe: Any, engine: Processes) -> None:
    before = probe.until_idle.remote().result(timeout_s=60).steps
    under_way = probe.options(stream=True).stream.remote(greedy("orphan", PROMPT, LONG))
    next(iter(under_way))
    os.kill(probe.pid.remote().result(timeout_s=60), signal.SIGKILL)
    with pytest.raises(RayActorError):
        for _ in under_way:
            pass
    # Answered by the Probe that Serve starts in its place; the engine is the one from before.
    deadline = time.monotonic() + 240
    while True:
        try:
            load = probe.until_idle.remote().result(timeout_s=60)
            break
        except RayActorError:
            assert time.monotonic() < deadline
    assert load.steps < before + LONG
    assert len(engine.alive_after(0)) == 3


def test_an_update_of_the_engines_loses_no_request(
    probe: Any, engine: Processes, undisturbed: dict[float, list[int]]
) -> None:
    """The one engine is replaced by one with other options, while requests run and more come."""
    requests = [greedy(f"updated-{i}", PROMPT, LONG) for i in range(8)]
    answers = [probe.generate.remote(request) for request in requests[:4]]
    pools = [{"name": POOL, "tensor_parallel_size": 2, "engine": {"max_num_seqs": 8}}]
    health = {"check_period_s": 1.0, "drain_timeout_s": 30.0, "stalled_after_s": STALLED_AFTER_S}
    serve.run(probed(application_args(TINY, pools, health=health)), name=POOL, route_prefix=None)
    answers += [probe.generate.remote(request) for request in requests[4:]]
    assert [answer.result(timeout_s=240)[0] for answer in answers] == [undisturbed[0.0]] * 8
    assert engine.alive_after(40.0) == []


def test_nothing_is_left_of_a_deleted_application(
    application: Callable[..., Any], processes_of: Callable[[str], Processes]
) -> None:
    from ray.util import placement_group_table

    def groups() -> int:
        return sum(group["state"] != "REMOVED" for group in placement_group_table().values())

    before = groups()
    with application("brief", tensor_parallel_size=2):
        processes = processes_of("brief")
        assert len(processes.pids) == 3
        assert len(processes.alive_after(0)) == 3
        assert groups() == before + 1
    assert processes.alive_after(30) == []
    assert groups() == before
    processes.close()


def test_without_an_engine_a_request_waits_until_one_was_started_for_it(application: Callable[..., Any]) -> None:
    """A pool scaled to zero starts an engine when it is asked. A request that may lose none is given up with one."""
    pools = [{"name": "lazy", "replicas": {"min": 0, "max": 1}}]
    with application("lazy", pools=pools, args={"failover": {"max_losses": 0}}) as probe:
        assert probe.loads.remote().result(timeout_s=60) == []
        assert probe.info.remote().result(timeout_s=60).max_model_len == ENGINE["max_model_len"]
        token_ids, _ = probe.generate.remote(greedy("first", PROMPT, 5)).result(timeout_s=240)
        assert len(token_ids) == 5
        assert len(probe.loads.remote().result(timeout_s=60)) == 1
        under_way = probe.options(stream=True).stream.remote(greedy("poison", PROMPT, LONG))
        next(iter(under_way))
        os.kill(probe.shard_pid.remote("lazy").result(timeout_s=60), signal.SIGKILL)
        with pytest.raises(RayTaskError) as raised:
            list(under_way)
        assert isinstance(raised.value.cause, EngineDeadError)
        assert "1 engine(s) were lost" in str(raised.value.cause)
