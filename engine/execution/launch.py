"""The other ranks as processes on this machine, which never outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import signal
import time
from multiprocessing.connection import Connection, wait

import msgspec

from engine import errors
from engine.config import EngineConfig, ModelConfig
from engine.errors import DibitError, EngineDeadError
from engine.execution.follower import run_follower
from engine.execution.messages import Failed, Loaded

STOP_SECONDS = 5.0
"""How long a follower may take to end before it is killed."""


_REPORTS = msgspec.msgpack.Decoder(Loaded | Failed)


class LocalFollowers:
    """Ranks 1 ... ``tensor_parallel_size`` - 1 of an engine.

    Each holds the other end of a pipe: it reports through it, and ends when it closes, which it does however this
    process ends. Ctrl-C, which a terminal sends to all of them, is left to rank 0.

    Args:
        config: the engine's.
        model: the engine's.
        rendezvous: where the ranks meet.
        control_address: rank 0's control channel.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, *, rendezvous: str, control_address: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = {}
        self._pipes: dict[int, Connection] = {}
        self._failures: dict[int, DibitError] = {}
        self._silent: set[int] = set()
        for rank in range(1, config.tensor_parallel_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=run_follower,
                args=(config, model, rank, rendezvous, control_address, theirs),
                name=f"dibit-rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes[rank] = process
            self._pipes[rank] = ours

    @property
    def pids(self) -> dict[int, int | None]:
        """Process id of each rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def wait_loaded(self) -> None:
        """Block until all have their weights.

        Raises:
            DibitError: one could not load, as it says itself.
            EngineDeadError: one died without a word.
        """
        waiting = dict(self._pipes)
        while waiting:
            ready = wait(list(waiting.values()))
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    self._read(rank)
                    self.check()
                    del waiting[rank]

    def check(self) -> None:
        """Raise what the first rank that failed said, if one did; cheap."""
        for rank, pipe in self._pipes.items():
            if rank not in self._failures and pipe.poll():
                self._read(rank)
        for failure in self._failures.values():
            raise failure

    def failure(self, timeout: float = 2.0) -> DibitError | None:
        """Why a step or the start went wrong: the failures that show within `timeout`, and of those the likely cause.

        That is an error of the follower's own, else a death without a word; those who only lost the others come last.
        """
        deadline = time.monotonic() + timeout
        while not self._failures and (left := deadline - time.monotonic()) > 0:
            ready = wait(list(self._pipes.values()), left)
            for rank, pipe in self._pipes.items():
                if pipe in ready:
                    self._read(rank)

        def likelihood(rank: int) -> tuple[bool, bool]:
            return isinstance(self._failures[rank], EngineDeadError), rank not in self._silent

        return self._failures[min(self._failures, key=likelihood)] if self._failures else None

    def stop(self, *, grace: float = 0.0) -> None:
        """End all followers, by force if need be; may be called again.

        Args:
            grace: seconds they may take to end by themselves, where rank 0 has told them to.
        """
        deadline = time.monotonic() + grace
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        for pipe in self._pipes.values():
            pipe.close()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()

    def _read(self, rank: int) -> None:
        try:
            report = _REPORTS.decode(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(STOP_SECONDS)
            self._silent.add(rank)
            self._failures[rank] = EngineDeadError(f"rank {rank} died, {_cause(process.exitcode)}")
            return
        if isinstance(report, Failed):
            self._failures[rank] = _revive(rank, report)


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


def _revive(rank: int, report: Failed) -> DibitError:
    kind = getattr(errors, report.error, None)
    if isinstance(kind, type) and issubclass(kind, DibitError) and kind is not EngineDeadError:
        return kind(f"rank {rank}: {report.text}")
    return EngineDeadError(f"rank {rank} failed: {report.text}")
