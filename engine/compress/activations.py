"""The hidden states of all calibration tokens between two layers, in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Activations(Protocol):
    """Hidden states of S sequences of L tokens, [S, L, H], read and replaced in batches of whole sequences."""

    def read(self, first: int, last: int) -> Tensor:
        """Sequences ``first`` to ``last`` (not included): a copy on the host, [last - first, L, H]."""

    def advance(self, layer: int, outputs: Iterator[tuple[int, Tensor]]) -> None:
        """Replace all of them by the inputs of ``layer``: (first sequence, states) of batch after batch.

        The iterator may :meth:`read` the states that it has not replaced yet.
        """

    def latest(self) -> int | None:
        """The layer whose inputs are there; None if there are none."""


class MemoryActivations:
    """All of them as one tensor on the host."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._states = torch.empty(shape, dtype=dtype)
        self._layer: int | None = None

    def latest(self) -> int | None:
        """None at first: nothing outlives the process."""
        return self._layer

    def read(self, first: int, last: int) -> Tensor:
        """See :class:`Activations`."""
        return self._states[first:last].clone()

    def advance(self, layer: int, outputs: Iterator[tuple[int, Tensor]]) -> None:
        """In place: nobody reads the states of a batch after its outputs are there."""
        for first, states in outputs:
            self._states[first : first + len(states)].copy_(states)
        self._layer = layer


class DiskActivations:
    """A file for the inputs of one layer. The next layer's is written beside it and put in its place when whole.

    Files are written and read, not mapped: on a full disk a write fails with an error that can be reported, a mapped
    page with a signal. A process that dies leaves the last whole file, from which :meth:`latest` goes on.

    Args:
        folder: where the files are.
        shape: (S, L, H).
        dtype: of the states.
        name: what the files begin with.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, name: str = "inputs") -> None:
        self._folder = folder
        self._name = name
        self._shape = shape
        self._dtype = dtype
        self._bytes = shape[1] * shape[2] * dtype.itemsize  # of one sequence
        self._layer = self.latest()

    def latest(self) -> int | None:
        """The layer whose inputs are there; None if there are none."""
        found = [int(path.stem.rpartition("-")[2]) for path in self._folder.glob(f"{self._name}-*.bin")]
        return max(found, default=None)

    def read(self, first: int, last: int) -> Tensor:
        """See :class:`Activations`."""
        if self._layer is None:
            raise RuntimeError("read() before the first advance()")
        raw = torch.empty((last - first) * self._bytes, dtype=torch.uint8)
        with self._path(self._layer).open("rb") as file:
            file.seek(first * self._bytes)
            if file.readinto(raw.numpy().data) != len(raw):
                raise OSError(f"{self._path(self._layer)} ends early")
        return raw.view(self._dtype).view(last - first, *self._shape[1:])

    def advance(self, layer: int, outputs: Iterator[tuple[int, Tensor]]) -> None:
        """Into a new file; the old one goes when the new one is safe."""
        path = self._path(layer)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            for first, states in outputs:
                file.seek(first * self._bytes)
                file.write(states.cpu().contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        if self._layer is not None and self._layer != layer:
            self._path(self._layer).unlink(missing_ok=True)
        self._layer = layer

    def _path(self, layer: int) -> Path:
        return self._folder / f"{self._name}-{layer:05d}.bin"


def batches(
    states: Activations, sequences: int, size: int, change: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """(first sequence, ``change`` of its batch) for batches of ``size`` sequences."""
    for first in range(0, sequences, size):
        yield first, change(states.read(first, min(first + size, sequences)))


def available_memory() -> int:
    """Bytes of memory that could be used without swapping; the machine's free memory where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
