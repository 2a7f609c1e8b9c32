"""Follower processes that serve one engine after the other: starting a process takes seconds, loading a tiny model does
not. They do what a Ray shard does: `Worker.initialize`, then `follow`."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from engine.config import EngineConfig, ModelConfig
from engine.execution.control import ControlChannel
from engine.execution.executor import Executor, follow
from engine.execution.parallel import free_address
from engine.execution.worker import Worker

SECONDS = 60
LOOPBACK = "127.0.0.1"


class RankPool:
    """Processes for ranks 1 ... size - 1."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(1, self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @contextmanager
    def executor(self, config: EngineConfig) -> Iterator[Executor]:
        """An executor of `config.tensor_parallel_size` ranks."""
        size = config.tensor_parallel_size
        model = ModelConfig.from_folder(config.model)
        control = ControlChannel(LOOPBACK, size)  # first, or it might be given the port that is only known to be free
        rendezvous = free_address(LOOPBACK)
        busy = self.pipes[: size - 1]
        for pipe in busy:
            pipe.send((config, model, rendezvous, control.address))
        worker = Worker(config, model, rank=0, world_size=size, rendezvous=rendezvous)

        def check() -> None:
            for pipe in busy:
                if pipe.poll():
                    raise RuntimeError(pipe.recv())

        try:
            worker.load()
            worker.connect(check)
            executor = Executor(worker, control)
        except BaseException:  # followers may wait for this rank for an hour
            self._kill()
            self._start()
            raise
        try:
            yield executor
        finally:
            executor.shutdown()
        for pipe in busy:
            if not pipe.poll(SECONDS):
                raise TimeoutError("a follower did not end after shutdown")
            if (failure := pipe.recv()) is not None:
                raise RuntimeError(failure)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.close()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(SECONDS)
            process.kill()


def serve(rank: int, pipe: Connection) -> None:
    """The life of a pooled process."""
    while True:
        try:
            config, model, rendezvous, control_address = pipe.recv()
        except EOFError:
            return
        try:
            worker = Worker(config, model, rank=rank, world_size=config.tensor_parallel_size, rendezvous=rendezvous)
            worker.initialize()
            follow(worker, control_address)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())
