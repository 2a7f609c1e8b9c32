"""Running compiled kernels, one after the other, on several threads.

The threads are helpers: whoever runs a kernel works through its tasks, and helpers that are awake take some of them.
Nobody waits for a thread that has not begun, as the barrier of an OpenMP region does; where other programs are on the
same cores, that wait costs milliseconds, at each of hundreds of products in a step. Between kernels a helper looks for
work for some tenths of a millisecond, then sleeps until it is woken.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, Protocol

import torch

LEAST_BYTES = 128 << 10
"""Bytes to read for which a helper is wanted: tens of microseconds, of which waking one takes a few."""
LOOKS = 20_000
"""How often a helper looks for work before it sleeps, some tenths of a millisecond: longer than the kernels of a step
that want no helper, as nobody wakes it amid a program."""

Arguments = Any
"""A ctypes array of int64."""


class Stage:
    """A kernel and its arguments.

    Args:
        name: of a kernel of `kernels.cpu.library`.
        arguments: without the counter of tasks, which comes first.
        tasks: how many there are.
        num_bytes: that it goes through in all, for choosing the number of threads.
        keep: whatever owns the memory that the arguments are addresses of.
        check: looks at the arguments afterwards, and raises what went wrong.
    """

    __slots__ = ("arguments", "check", "helpers", "keep", "name")

    def __init__(
        self,
        name: str,
        arguments: Sequence[int],
        *,
        tasks: int,
        num_bytes: int,
        keep: object = None,
        check: Callable[[Arguments], None] | None = None,
    ) -> None:
        self.name = name
        self.check = check
        self.arguments: Arguments = _array(len(arguments) + 1)(0, *arguments)
        self.helpers = max(0, min(tasks, num_bytes // LEAST_BYTES) - 1)
        self.keep = keep


class Listener(Protocol):
    """Hears of what is run."""

    def ran(self, stages: Sequence[Stage]) -> None:
        """Kernels that were run in their order."""


listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
"""Who hears of the kernels that are run in this context; see `kernels.cpu.tape`."""


def run(*stages: Stage) -> None:
    """Run kernels in their order, each on up to ``torch.get_num_threads()`` threads, until its tasks are done.

    Raises:
        IndexError: a kernel found an index that is out of range.
    """
    most = torch.get_num_threads() - 1
    if most <= 0 or not any(stage.helpers for stage in stages) or not _pool(os.getpid()).run(plan(stages, most), most):
        library = _library()
        for stage in stages:
            library.function(stage.name)(stage.arguments)
    for stage in stages:
        if stage.check is not None:
            stage.check(stage.arguments)
    if (hearing := listener.get()) is not None:
        hearing.ran(stages)


class Program:
    """Kernels that are run in their order again and again, with the same arguments, by one call."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)
        self._checked = tuple(stage for stage in stages if stage.check is not None)
        self._plans: dict[int, Arguments] = {}  # by the greatest number of helpers

    def run(self) -> None:
        """As :func:`run`."""
        most = torch.get_num_threads() - 1
        if most <= 0 or not _pool(os.getpid()).run(self._plan(most), most):
            _library().function("work")(self._plan(0))
        for stage in self._checked:
            if stage.check is not None:
                stage.check(stage.arguments)

    def _plan(self, most: int) -> Arguments:
        if most not in self._plans:
            self._plans[most] = plan(self._stages, most)
        return self._plans[most]


def plan(stages: Sequence[Stage], most: int) -> Arguments:
    """Arguments of `pool.work` for these stages with at most so many helpers; its first is for who runs it."""
    numbers = [0, len(stages)]
    for stage in stages:
        numbers += (_library().address(stage.name), ctypes.addressof(stage.arguments), min(stage.helpers, most))
    return _array(len(numbers))(*numbers)


def fp32(value: float) -> int:
    """A number as an argument: its bits."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def compile_all() -> None:
    """Compile the kernels; the first use loads numba, which nobody else here needs."""
    _library().compile_all()


def has_vnni() -> bool:
    """Whether the kernels use AVX-512's products of bytes, rather than plain loops."""
    return bool(_library().NATIVE)


@cache
def _array(length: int) -> Any:
    return ctypes.c_int64 * length


@lru_cache(maxsize=1)
def _library() -> Any:
    from kernels.cpu import library

    return library


@lru_cache(maxsize=1)
def _pool(process: int) -> HelperPool:
    """Of this process: threads don't survive a fork."""
    return HelperPool()


class HelperPool:
    """Threads beside the caller's; only one caller at a time has them."""

    def __init__(self) -> None:
        from kernels.cpu import pool

        self._room = torch.zeros(pool.WIDTH, dtype=torch.int64)  # torch aligns it to a cache line
        self._state = self._room.data_ptr()
        self._busy = threading.Lock()
        self._helpers: list[Helper] = []

    def run(self, arguments: Arguments, most: int) -> bool:
        """Run what `plan` made for at most so many helpers; False if another thread has them."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            wanted = min(most, max(arguments[4::3]))
            while len(self._helpers) < wanted:
                self._helpers.append(Helper(self._state, len(self._helpers)))
            for helper in self._helpers[:wanted]:
                helper.wake()
            arguments[0] = self._state
            _library().function("work")(arguments)
        finally:
            self._busy.release()
        return True


class Helper:
    """A thread that looks for work in a state that `kernels.cpu.pool` describes."""

    def __init__(self, state: int, index: int) -> None:
        self._call = _array(3)(state, index, LOOKS)
        self._asleep = False
        self._bell = threading.Semaphore(0)
        threading.Thread(target=self._serve, name=f"kernel-helper-{index}", daemon=True).start()

    def wake(self) -> None:
        """Let it look for work, if it sleeps."""
        if self._asleep:
            self._asleep = False
            self._bell.release()

    def _serve(self) -> None:
        serve = _library().function("serve")
        while True:
            serve(self._call)
            self._asleep = True  # a caller that comes before this does without
            self._bell.acquire()
