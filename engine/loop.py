"""EngineCore in a thread of its own, fed through a queue."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from engine.core import EngineCore
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineRequest, StepOutput

HEARTBEAT_SECONDS = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Submit:
    requests: list[EngineRequest]
    submitted: float
    """``time.perf_counter()`` then."""


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[EngineCore], Any]
    result: Future[Any]


@dataclass(frozen=True, slots=True)
class _Wake:
    """There is something to do, which the core knows."""


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Submit | _Abort | _Call | _Wake | _Stop


class EngineLoop:
    """Steps an :class:`EngineCore` as long as there is work, and waits on its queue when there is none.

    Every method may be called from any thread. Submissions and aborts take effect before the next step, in the order in
    which they were made. Both callbacks run in the engine thread and hold up the next step; the first is called with

    * the output of each step;
    * ``refused`` filled in for requests that :meth:`EngineCore.add` refused, with the next step's output, or at once if
      there is no work (an id that was refused because it is in use names two requests: make ids unique);
    * no deltas about every ``heartbeat_seconds`` while idle, as a sign of life.

    Aborted requests get no delta; at most what a step under way still yields is heard of them.

    Args:
        core: the engine; the loop alone calls it from now on, and shuts it down when it ends.
        on_step: called with each :class:`StepOutput`. If it raises, that counts as a failed step.
        on_error: called once if a step fails, after which the loop has ended.
        heartbeat_seconds: the longest silence while idle.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        on_step: Callable[[StepOutput], None],
        on_error: Callable[[EngineDeadError], None],
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._core = core
        self._on_step = on_step
        self._on_error = on_error
        self._heartbeat_seconds = heartbeat_seconds
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._refused: dict[str, RequestError] = {}
        self._ended = False
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        core.on_ready(lambda: self._commands.put(_Wake()))

    @property
    def is_alive(self) -> bool:
        """Whether steps are made: between :meth:`start` and :meth:`stop`, unless one failed."""
        return self._thread.is_alive() and not self._ended

    @property
    def last_progress(self) -> float:
        """``time.monotonic()`` of the last step or heartbeat; one far back means that a step hangs."""
        return self._last_progress

    def start(self) -> None:
        """Start the engine thread; once only."""
        self._thread.start()

    def submit(self, requests: Iterable[EngineRequest]) -> None:
        """Queue requests for the next step.

        Raises:
            EngineDeadError: the loop has ended.
        """
        if self._ended:
            raise EngineDeadError("the engine has stopped; send the request to another one")
        self._commands.put(_Submit(list(requests), time.perf_counter()))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests before the next step; unknown ids and an ended loop are no error."""
        self._commands.put(_Abort(list(request_ids)))

    def call(self, function: Callable[[EngineCore], T]) -> Future[T]:
        """Run ``function`` on the core in the engine thread, before the next step; it must be short.

        For whatever must not happen during a step: ``call(lambda core: core.check())``, or a snapshot that the
        ``cached`` and ``evicted`` of later steps go on from, ``call(EngineCore.cached_blocks)``. The future's own
        callbacks run in the engine thread too, before the next step: a callback that hands its result over in the way
        in which ``on_step`` hands over outputs (``call_soon_threadsafe``) keeps the two in order.

        Returns:
            What it returns or raises; EngineDeadError if the loop ends before (or has ended).
        """
        result: Future[T] = Future()
        self._commands.put(_Call(function, result))
        if self._ended:  # perhaps before the command was there to be found
            self._fail_calls()
        return result

    def stop(self) -> None:
        """End the loop after the step under way, and wait for that; requests under way are dropped without a word.

        May be called again, before :meth:`start`, and from a callback (which then doesn't wait).
        """
        if self._thread.ident is None:
            self._ended = True
            self._fail_calls()
            self._core.shutdown()
        self._commands.put(_Stop())
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                output = self._core.step()
                self._last_progress = time.monotonic()
                if self._refused:
                    output = replace(output, refused=self._refused | output.refused)
                    self._refused = {}
                self._on_step(output)
        except BaseException as error:  # nobody above this thread would hear of it
            self._ended = True
            failure = EngineDeadError(f"the engine stopped: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._on_error(failure)
        finally:
            self._ended = True
            self._fail_calls()
            self._core.shutdown()  # last, as it may take long with ranks that are gone

    def _obey(self) -> bool:
        """Carry out what has been asked since the last step, waiting for it (or a heartbeat) if idle; False to stop."""
        command = self._next_command(wait=not self._core.has_work())
        while command is not None:
            match command:
                case _Stop():
                    return False
                case _Abort(request_ids):
                    self._core.abort(request_ids)
                case _Call(function, result):
                    _carry_out(function, self._core, result)
                case _Submit(requests, submitted):
                    for request in requests:
                        try:
                            self._core.add(request, submitted=submitted)
                        except RequestError as error:
                            self._refused[request.request_id] = error
            command = self._next_command(wait=False)
        return True

    def _fail_calls(self) -> None:
        """Fail the calls that nobody will carry out; other commands need no answer."""
        while (command := self._next_command(wait=False)) is not None:
            if isinstance(command, _Call) and command.result.set_running_or_notify_cancel():
                command.result.set_exception(EngineDeadError("the engine has stopped"))

    def _next_command(self, *, wait: bool) -> _Command | None:
        try:
            return self._commands.get(timeout=self._heartbeat_seconds) if wait else self._commands.get_nowait()
        except queue.Empty:
            return None


def _carry_out(function: Callable[[EngineCore], Any], core: EngineCore, result: Future[Any]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        value = function(core)
    except Exception as error:
        result.set_exception(error)
    else:
        result.set_result(value)
