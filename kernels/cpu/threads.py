"""Running compiled kernels, one after the other, on several threads.

The threads are helpers: whoever runs a kernel works through its tasks, and helpers that are awake take some of them.
Nobody waits for a thread that has not begun, as the barrier of an OpenMP region does; where other programs are on the
same cores, that wait costs milliseconds, at each of hundreds of products in a step. Between kernels a helper looks for
work for some tens of microseconds, then sleeps until it is woken.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch

LEAST_BYTES = 128 << 10
"""Bytes to read for which a helper is wanted: tens of microseconds, of which waking one takes a few."""
LOOKS = 2000
"""How often a helper looks for work before it sleeps; some 30 to 100 microseconds."""

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
    """

    __slots__ = ("arguments", "helpers", "keep", "name")

    def __init__(self, name: str, arguments: Sequence[int], *, tasks: int, num_bytes: int, keep: object = None) -> None:
        self.name = name
        self.arguments: Arguments = _array(len(arguments) + 1)(0, *arguments)
        self.helpers = max(0, min(tasks, num_bytes // LEAST_BYTES) - 1)
        self.keep = keep


def run(*stages: Stage) -> None:
    """Run kernels in their order, each on up to ``torch.get_num_threads()`` threads, until its tasks are done."""
    library = _library()
    most = torch.get_num_threads() - 1
    if most > 0 and any(stage.helpers for stage in stages) and _pool(os.getpid()).run(stages, most):
        return
    for stage in stages:
        library.function(stage.name)(stage.arguments)


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

    def run(self, stages: Sequence[Stage], most: int) -> bool:
        """Run kernels with at most so many helpers; False if another thread has them."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            library = _library()
            wanted = min(most, max(stage.helpers for stage in stages))
            while len(self._helpers) < wanted:
                self._helpers.append(Helper(self._state, len(self._helpers)))
            for helper in self._helpers[:wanted]:
                helper.wake()
            plan = [self._state, len(stages)]
            for stage in stages:
                plan += (library.address(stage.name), ctypes.addressof(stage.arguments), min(stage.helpers, most))
            library.function("work")(_array(len(plan))(*plan))
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
