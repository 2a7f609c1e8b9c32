"""The compiled kernels by name: compiled when first wanted, kept in numba's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from kernels.cpu import (
    activations,
    arithmetic,
    attend,
    chunks,
    compiled,
    elementwise,
    emit,
    experts,
    halves,
    layout,
    planes,
    pool,
    vector,
    words,
)

logger = logging.getLogger(__name__)

_FACTORIES: dict[str, Callable[..., Any]] = {
    "quantize": compiled.quantize,
    "product": compiled.product,
    "decode": compiled.decode,
    "halves": halves.halves,
    "norm": elementwise.norm,
    "activate": elementwise.activate,
    "rotate": elementwise.rotate,
    "look_up": elementwise.look_up,
    "divide": attend.divide,
    "attend": attend.attend,
    "choose": experts.choose,
    "arrange": experts.arrange,
    "combine": experts.combine,
    "work": pool.work,
    "serve": pool.serve,
}
NATIVE = chunks.NATIVE
"""Whether the machine has the instructions of `kernels.cpu.vector`."""


@cache
def compile_all() -> None:
    """Compile what is missing in the cache, now rather than in the first step, and say so."""
    started, said = time.perf_counter(), False
    for name in _FACTORIES:
        kernel = _kernel(name)
        if kernel.cache_hits == 0 and not said:
            said = True
            logger.warning(
                "compiling the CPU kernels for %s: up to a minute; they are kept in %s",
                "AVX-512 with VNNI and VBMI" if NATIVE else "plain vector instructions",
                kernel._cache.cache_path or "no folder",
            )
    if said:
        logger.warning("compiled the CPU kernels in %.1f s", time.perf_counter() - started)


@cache
def address(name: str) -> int:
    """Where a kernel is."""
    return int(_kernel(name).address)


@cache
def function(name: str) -> Callable[[Any], None]:
    """A kernel, to be called without the interpreter's lock."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address(name))


@cache
def _kernel(name: str) -> Any:
    try:
        return _FACTORIES[name](_version(), cache=True)
    except RuntimeError:  # numba found no folder to keep it in
        _warn()
        return _FACTORIES[name](_version(), cache=False)


@cache
def _warn() -> None:
    logger.warning(
        "no folder to keep the CPU kernels in can be written, so each process compiles them; set NUMBA_CACHE_DIR"
    )


@cache
def _version() -> str:
    """Of the sources, as a part of the key of numba's cache: by itself it looks only at the age of a kernel's own file
    and would miss a change of what that imports."""
    kernels = (attend, compiled, elementwise, experts, halves, pool)
    modules = (*kernels, activations, arithmetic, chunks, emit, layout, planes, vector, words)
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()
