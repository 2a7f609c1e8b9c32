"""Processes killed with -9: who notices, who goes along, who comes back, and what is left over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Processes
from probe import greedy
from ray.exceptions import RayActorError, RayTaskError

from engine.errors import EngineDeadError

POOL = "fragile"
LONG = 400


@pytest.fixture(scope="module")
def probe(application: Callable[..., Any]) -> Iterator[Any]:
    with application(POOL, tensor_parallel_size=2) as handle:
        yield handle


@pytest.fixture
def engine(probe: Any, processes_of: Callable[[str], Processes]) -> Iterator[Processes]:
    """The processes of the one engine, which takes requests."""
    probe.until_engines.remote(1).result(timeout_s=240)
    processes = processes_of(POOL)
    assert len(processes.pids) == 3, processes.pids
    yield processes
    processes.close()


def kill(processes: Processes, ending: str) -> None:
    (pid,) = [pid for name, pid in processes.pids.items() if name.endswith(ending)]
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_its_replica_along_and_another_comes(probe: Any, engine: Processes, rank: int) -> None:
    under_way = probe.options(stream=True).stream.remote(greedy(f"victim-{rank}", [1, 2, 3], LONG))
    next(iter(under_way))
    kill(engine, f"shard-{rank}")
    assert engine.alive_after(2.0) == []
    with pytest.raises(RayTaskError) as raised:
        for _ in under_way:
            pass
    assert isinstance(raised.value.cause, EngineDeadError)
    probe.until_engines.remote(1).result(timeout_s=240)
    token_ids, _ = probe.generate.remote(greedy(f"after-{rank}", [1, 2, 3], 5)).result(timeout_s=120)
    assert len(token_ids) == 5


def test_a_killed_replica_takes_its_ranks_along(probe: Any, engine: Processes) -> None:
    (replica,) = [name for name in engine.pids if "EngineReplica" in name]
    os.kill(engine.pids[replica], signal.SIGKILL)
    assert engine.alive_after(2.0) == []


def test_a_killed_ingress_leaves_no_request_behind(probe: Any, engine: Processes) -> None:
    under_way = probe.options(stream=True).stream.remote(greedy("orphan", [1, 2, 3], LONG))
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
    assert load.steps < LONG
    assert len(engine.alive_after(0)) == 3


def test_nothing_is_left_of_a_deleted_application(
    application: Callable[..., Any], processes_of: Callable[[str], Processes]
) -> None:
    with application("brief", tensor_parallel_size=2):
        processes = processes_of("brief")
        assert len(processes.pids) == 3
        assert len(processes.alive_after(0)) == 3
    assert processes.alive_after(30) == []
    processes.close()
