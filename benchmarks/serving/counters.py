"""Counts that other processes make and this one reads while they do: one small mapped file for each process."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

FOLDER = "DIBIT_BENCHMARK_COUNTERS"
"""Environment variable: where the files are."""

_LAYOUT = struct.Struct("qq")


class Counter:
    """Written by one process, on one thread."""

    def __init__(self, path: str) -> None:
        """Make the file of this process in the folder that the environment names.

        Args:
            path: the way of a token that is counted: ``ours`` or ``naive``.
        """
        file = Path(os.environ[FOLDER]) / f"{path}-{os.getpid()}-{id(self)}"
        file.write_bytes(bytes(_LAYOUT.size))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), _LAYOUT.size)
        self._items = self._calls = 0

    def item(self) -> None:
        """An item of a streaming generator was sent."""
        self._items += 1
        self._write()

    def call(self) -> None:
        """A call came in."""
        self._calls += 1
        self._write()

    def _write(self) -> None:
        _LAYOUT.pack_into(self._map, 0, self._items, self._calls)


@dataclass(frozen=True, slots=True)
class Messages:
    """Ray messages since the start."""

    items: int
    calls: int

    @classmethod
    def read(cls, folder: Path, path: str) -> Messages:
        """The sum over all processes of a path; a count is read whole, or as it was before."""
        found = [_LAYOUT.unpack(file.read_bytes()) for file in folder.glob(f"{path}-*")]
        return cls(sum(items for items, _ in found), sum(calls for _, calls in found))

    def __sub__(self, before: Messages) -> Messages:
        return Messages(self.items - before.items, self.calls - before.calls)
