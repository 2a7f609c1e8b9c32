"""Room for weights in huge pages, where the system has them for who asks.

A core reads weights once and in order, and what fetches ahead of it stops at the end of a page: from pages of 2 MiB it
gets half as much again a second as from those of 4 KiB (benchmarks/cpu_decode.py, "pages").
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from functools import lru_cache

import torch
from torch import Tensor

PAGE = 2 << 20
SLAB = 64 << 20
"""Bytes that are asked for at a time: weights of a megabyte would share no huge page otherwise."""
LINE = 64


class Slabs:
    """Takes slabs from the system and cuts them up; a slab is given back when nothing in it is used any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """Uint8 [size] of zeros, at a multiple of 64."""
        with self._lock:
            if self._used + size > self._slab.numel():
                with torch.inference_mode(False):  # the next taker may be outside it, where such tensors can't change
                    self._slab, self._used = _slab(max(SLAB, -(-size // PAGE) * PAGE)), 0
            first = self._used
            self._used = -(-(first + size) // LINE) * LINE
            return self._slab[first : first + size]


def bytes_for(*shape: int) -> Tensor:
    """Uint8 zeros of a shape, for weights."""
    size = 1
    for length in shape:
        size *= length
    return _slabs().take(size).view(shape)


@lru_cache(maxsize=1)
def _slabs() -> Slabs:
    return Slabs()


def _slab(size: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux has it
        return torch.zeros(size, dtype=torch.uint8)
    room = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        room.madvise(mmap.MADV_HUGEPAGE)
    slab = torch.frombuffer(room, dtype=torch.uint8)
    start = -slab.data_ptr() % PAGE
    return slab[start : start + size]
