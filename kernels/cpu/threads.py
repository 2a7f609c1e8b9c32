"""Running a compiled kernel on torch's threads.

torch's CPU operations run in the pool of an OpenMP runtime. A second pool beside it (numba's, or Python's) would find
the cores taken: workers of the first spin for a while after each region, waiting for the next. So the kernels are given
to the same runtime, through `GOMP_parallel`, which GCC's runtime has, and LLVM's for compatibility.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


LEAST_BYTES = 128 << 10
"""Bytes to read for which another thread is woken: tens of microseconds, of which waking and waiting take a few."""


def run(name: str, arguments: np.ndarray, *, tasks: int, num_bytes: int) -> None:
    """Run a kernel on up to ``torch.get_num_threads()`` threads, until its tasks are done.

    Args:
        name: of a kernel of `kernels.cpu.compiled`.
        arguments: int64; the first is the counter of tasks, 0.
        tasks: how many there are.
        num_bytes: that it goes through in all, for choosing the number of threads.
    """
    address = arguments.ctypes.data
    count = min(torch.get_num_threads(), tasks, num_bytes // LEAST_BYTES)
    if count <= 1:
        _function(name)(address)
        return
    parallel = _parallel()
    if parallel is not None:
        parallel(kernels()[name], address, count, 0)
        return
    with ThreadPoolExecutor(count) as pool:  # ctypes lets go of the interpreter's lock
        for result in [pool.submit(_function(name), address) for _ in range(count)]:
            result.result()


def kernels() -> dict[str, int]:
    """Address of each kernel; the first call compiles them, and loads numba, which nobody else here needs."""
    from kernels.cpu import compiled

    return compiled.addresses()


@cache
def has_vnni() -> bool:
    """Whether the kernels use AVX-512's products of bytes, rather than plain loops."""
    from kernels.cpu import compiled

    return compiled.NATIVE


@cache
def _function(name: str) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(kernels()[name])


@cache
def _parallel() -> Callable[..., Any] | None:
    """``GOMP_parallel(function, argument, threads, flags)`` of the runtime that torch has loaded; None without one."""
    folder = Path(torch.__file__).parent
    bundled = [*folder.glob("lib/lib*omp*"), *folder.parent.glob("torch.libs/lib*omp*")]
    for library in [str(path) for path in bundled] + ["libgomp.so.1", "libiomp5.so", "libomp.so"]:
        try:
            # Only what is loaded already: another copy would be another pool.
            function = ctypes.CDLL(library, mode=getattr(os, "RTLD_NOLOAD", 0) | ctypes.DEFAULT_MODE).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    logger.warning("torch's OpenMP runtime was not found: packed products start threads of their own")
    return None
