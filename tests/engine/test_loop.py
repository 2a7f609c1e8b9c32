from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest
from toy_executor import Collector, ToyExecutor, make_core, make_request, run

from engine.core import EngineCore
from engine.errors import EngineDeadError, RequestError
from engine.loop import EngineLoop
from engine.messages import StepOutput

WAIT = 30.0  # seconds until a test gives up on an event


class Running:
    """A loop around a toy engine, with what its callbacks were given."""

    def __init__(self, *, heartbeat_seconds: float = WAIT, on_step: Callable[[StepOutput], None] | None = None) -> None:
        self.executor = ToyExecutor(num_kv_blocks=32, block_size=4)
        self.outputs: queue.Queue[StepOutput] = queue.Queue()
        self.errors: queue.Queue[EngineDeadError] = queue.Queue()
        self.core = make_core(self.executor)
        self.loop = EngineLoop(
            self.core,
            on_step=on_step or self.outputs.put,
            on_error=self.errors.put,
            heartbeat_seconds=heartbeat_seconds,
        )

    def until_finished(self, *names: str) -> Collector:
        collector, missing = Collector(), set(names)
        while missing:
            output = self.outputs.get(timeout=WAIT)
            collector(output)
            missing -= {delta.request_id for delta in output.deltas if delta.finish_reason}
        return collector


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    running.loop.start()
    yield running
    running.executor.gate.set()
    running.loop.stop()
    assert not running.loop.is_alive
    assert running.executor.shutdowns == 1


def test_requests_get_the_tokens_they_get_from_the_core(running: Running) -> None:
    requests = [make_request(f"r{i}", [5 + i] * (i + 1), 6) for i in range(6)]
    running.loop.submit(requests[:2])
    running.loop.submit(requests[2:])
    collector = running.until_finished(*(request.request_id for request in requests))
    expected = run(make_core(ToyExecutor(num_kv_blocks=32, block_size=4)), requests)
    assert collector.token_ids == expected.token_ids
    assert running.loop.is_alive


def test_callbacks_run_in_the_engine_thread() -> None:
    threads: queue.Queue[str] = queue.Queue()
    running = Running(on_step=lambda output: threads.put(threading.current_thread().name))
    running.loop.start()
    running.loop.submit([make_request("a", [5], 1)])
    assert threads.get(timeout=WAIT) == "engine"
    running.loop.stop()


def test_a_request_that_arrives_during_a_step_joins_the_next(running: Running) -> None:
    running.executor.gate.clear()
    running.loop.submit([make_request("a", [5], 8)])
    assert running.executor.entered.wait(timeout=WAIT)
    running.loop.submit([make_request("b", [6], 8)])
    running.executor.gate.set()
    assert [delta.request_id for delta in running.outputs.get(timeout=WAIT).deltas] == ["a"]
    assert [delta.request_id for delta in running.outputs.get(timeout=WAIT).deltas] == ["a", "b"]
    running.until_finished("a", "b")


def test_an_abort_takes_effect_with_the_next_step(running: Running) -> None:
    running.executor.gate.clear()
    running.loop.submit([make_request("a", [5], 8), make_request("b", [6], 8)])
    assert running.executor.entered.wait(timeout=WAIT)
    running.loop.abort(["a", "never seen"])
    running.executor.gate.set()
    collector = running.until_finished("b")
    assert len(collector.token_ids["a"]) == 1
    assert collector.last["a"].finish_reason is None
    assert len(collector.token_ids["b"]) == 8


def test_a_refused_request_is_reported_and_the_others_go_on(running: Running) -> None:
    running.loop.submit([make_request("long", [5] * 200, 8), make_request("a", [5], 2)])
    output = running.outputs.get(timeout=WAIT)
    assert set(output.refused) == {"long"}
    error = output.refused["long"]
    assert isinstance(error, RequestError)
    assert error.field == "prompt"
    assert [delta.request_id for delta in output.deltas] == ["a"]
    assert running.outputs.get(timeout=WAIT).refused == {}


def test_a_refusal_does_not_wait_for_other_work(running: Running) -> None:
    running.loop.submit([make_request("empty", [], 8)])
    output = running.outputs.get(timeout=WAIT)
    assert set(output.refused) == {"empty"}
    assert output.deltas == []


def test_an_idle_engine_gives_signs_of_life() -> None:
    running = Running(heartbeat_seconds=0.01)
    running.loop.start()
    before = running.loop.last_progress
    for _ in range(3):
        output = running.outputs.get(timeout=WAIT)
        assert output.deltas == []
        assert output.load.free_blocks == 32
    assert running.loop.last_progress > before
    running.loop.stop()


def test_an_idle_engine_waits_without_spinning(running: Running) -> None:
    with pytest.raises(queue.Empty):
        running.outputs.get(timeout=0.05)  # the heartbeat is far off: nothing may happen of itself


def test_a_failing_step_ends_the_loop_and_says_why() -> None:
    running = Running()
    running.executor.failure = RuntimeError("rank 1 is gone")
    running.loop.start()
    running.loop.submit([make_request("a", [5], 8)])
    error = running.errors.get(timeout=WAIT)
    assert "rank 1 is gone" in str(error)
    assert error.__cause__ is running.executor.failure
    assert not running.loop.is_alive
    running.loop.stop()
    assert running.executor.shutdowns == 1
    assert running.errors.empty()
    with pytest.raises(EngineDeadError, match="stopped"):
        running.loop.submit([make_request("b", [5], 8)])
    running.loop.abort(["a"])


def test_a_failing_callback_is_a_failed_step() -> None:
    def fail(output: StepOutput) -> None:
        raise ValueError("no one listens")

    running = Running(on_step=fail)
    running.loop.start()
    running.loop.submit([make_request("a", [5], 8)])
    assert "no one listens" in str(running.errors.get(timeout=WAIT))
    running.loop.stop()


def test_stop_ends_the_loop_with_requests_under_way() -> None:
    running = Running()
    running.loop.start()
    running.loop.submit([make_request("a", [5], 100)])
    running.outputs.get(timeout=WAIT)
    running.loop.stop()
    running.loop.stop()
    assert not running.loop.is_alive
    assert running.errors.empty()
    assert running.executor.shutdowns == 1


def test_stop_from_a_callback_does_not_wait_for_itself() -> None:
    stopped = threading.Event()

    def stop(output: StepOutput) -> None:
        running.loop.stop()
        stopped.set()

    running = Running(on_step=stop)
    running.loop.start()
    running.loop.submit([make_request("a", [5], 100)])
    assert stopped.wait(timeout=WAIT)
    running.loop.stop()
    assert running.executor.shutdowns == 1


def test_a_call_runs_between_steps_in_the_engine_thread(running: Running) -> None:
    running.executor.gate.clear()
    running.loop.submit([make_request("a", [5] * 9, 3)])
    assert running.executor.entered.wait(timeout=WAIT)
    checked = running.loop.call(lambda core: (core.check(), threading.current_thread().name)[1])
    snapshot = running.loop.call(EngineCore.cached_blocks)
    failing = running.loop.call(lambda core: 1 // 0)
    assert not checked.done()
    running.executor.gate.set()
    assert checked.result(timeout=WAIT) == "engine"
    assert len(snapshot.result(timeout=WAIT)) == 2
    with pytest.raises(ZeroDivisionError):
        failing.result(timeout=WAIT)
    running.until_finished("a")
    assert running.loop.call(EngineCore.has_work).result(timeout=WAIT) is False  # idle


def test_a_snapshot_and_the_steps_after_it_tell_all_that_is_cached() -> None:
    running = Running()
    events: queue.Queue[StepOutput | list[bytes]] = running.outputs  # type: ignore[assignment]
    running.loop.start()
    running.loop.submit([make_request(f"r{i}", [5 + i] * 9, 20) for i in range(9)])
    running.outputs.get(timeout=WAIT)
    running.loop.call(EngineCore.cached_blocks).add_done_callback(lambda future: events.put(future.result()))
    known: set[bytes] | None = None
    finished = 0
    while finished < 8:  # the first may have finished before
        event = events.get(timeout=WAIT)
        if isinstance(event, list):
            known = set(event)
            continue
        finished += sum(delta.finish_reason is not None for delta in event.deltas)
        if known is not None:
            known = known.union(event.cached).difference(event.evicted)
    while running.loop.call(EngineCore.has_work).result(timeout=WAIT):
        pass
    final = set(running.loop.call(EngineCore.cached_blocks).result(timeout=WAIT))
    while not events.empty():
        event = events.get()
        assert isinstance(event, StepOutput)
        known = (known or set()).union(event.cached).difference(event.evicted)
    assert known == final
    running.loop.stop()


def test_calls_of_a_loop_that_has_ended_fail() -> None:
    running = Running()
    early = running.loop.call(EngineCore.load)
    running.loop.stop()
    late = running.loop.call(EngineCore.load)
    for call in (early, late):
        with pytest.raises(EngineDeadError, match="stopped"):
            call.result(timeout=WAIT)
    failing = Running()
    failing.executor.failure = RuntimeError("gone")
    failing.loop.start()
    failing.loop.submit([make_request("a", [5], 8)])
    failing.errors.get(timeout=WAIT)
    with pytest.raises(EngineDeadError, match="stopped"):
        failing.loop.call(EngineCore.load).result(timeout=WAIT)
    failing.loop.stop()


def test_a_loop_that_never_started_still_shuts_its_engine_down() -> None:
    running = Running()
    running.loop.stop()
    assert running.executor.shutdowns == 1
    assert not running.loop.is_alive
