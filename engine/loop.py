"""EngineCore in a thread of its own, fed through a queue."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from engine.core import EngineCore
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineRequest, StepOutput

HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Submit:
    requests: list[EngineRequest]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


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
        self._commands: queue.SimpleQueue[_Submit | _Abort | _Stop] = queue.SimpleQueue()
        self._refused: dict[str, RequestError] = {}
        self._ended = False
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

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
        self._commands.put(_Submit(list(requests)))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests before the next step; unknown ids and an ended loop are no error."""
        self._commands.put(_Abort(list(request_ids)))

    def stop(self) -> None:
        """End the loop after the step under way, and wait for that; requests under way are dropped without a word.

        May be called again, before :meth:`start`, and from a callback (which then doesn't wait).
        """
        self._commands.put(_Stop())
        if self._thread.ident is None:
            self._core.shutdown()
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                output = self._core.step()
                self._last_progress = time.monotonic()
                if self._refused:
                    output = replace(output, refused=self._refused)
                    self._refused = {}
                self._on_step(output)
        except BaseException as error:  # nobody above this thread would hear of it
            self._ended = True
            failure = EngineDeadError(f"the engine stopped: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._on_error(failure)
        finally:
            self._ended = True
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
                case _Submit(requests):
                    for request in requests:
                        try:
                            self._core.add(request)
                        except RequestError as error:
                            self._refused[request.request_id] = error
            command = self._next_command(wait=False)
        return True

    def _next_command(self, *, wait: bool) -> _Submit | _Abort | _Stop | None:
        try:
            return self._commands.get(timeout=self._heartbeat_seconds) if wait else self._commands.get_nowait()
        except queue.Empty:
            return None
