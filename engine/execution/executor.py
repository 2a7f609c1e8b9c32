"""Rank 0's view of all ranks: a step in, logits out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineDeadError
from engine.execution.batch import StepInput
from engine.execution.control import ControlChannel
from engine.execution.follower import follow
from engine.execution.launch import STOP_SECONDS, LocalFollowers
from engine.execution.machine import check_gpus
from engine.execution.parallel import free_address
from engine.execution.worker import Progress, Worker

__all__ = ["Executor", "StepExecutor", "follow"]

LOOPBACK = "127.0.0.1"


class StepExecutor(Protocol):
    """What the engine's core needs of an :class:`Executor`."""

    @property
    def num_kv_blocks(self) -> int:
        """Pages in the KV cache."""

    @property
    def block_size(self) -> int:
        """Tokens in a page."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, padding ids included."""

    @property
    def max_model_len(self) -> int:
        """Tokens in a sequence at most, prompt and output."""

    def execute(self, step: StepInput) -> Tensor:
        """Run one flat batch; fp32 logits [len(step.logits_rows), vocab_size]."""

    def shutdown(self) -> None:
        """Let go of the model and of the other ranks; may be called again."""


class Executor:
    """Runs every step on all ranks.

    Args:
        worker: rank 0, initialized.
        control: the channel to the other ranks, each of which runs `follow`; None if there are none.
        followers: the other ranks, where they are processes of this executor.
    """

    def __init__(
        self, worker: Worker, control: ControlChannel | None = None, followers: LocalFollowers | None = None
    ) -> None:
        self._worker = worker
        self._control = control
        self._followers = followers
        self._failure: str | None = None
        self._closed = False
        self.num_kv_blocks = worker.num_kv_blocks
        self.block_size = worker.config.block_size
        self.vocab_size = worker.model.vocab_size
        self.max_model_len = worker.max_model_len

    @classmethod
    def start_local(cls, config: EngineConfig, model: ModelConfig, *, progress: Progress | None = None) -> Executor:
        """Start all ranks on this machine: rank 0 in this process, the others in processes of their own.

        As with everything that uses ``multiprocessing``, a script that calls this with several ranks needs the
        ``if __name__ == "__main__":`` guard.

        Args:
            config: how to run, ``tensor_parallel_size`` ranks.
            model: what to run.
            progress: told how far rank 0's loading is.

        Raises:
            ConfigError: the options contradict each other, the model or the machine; or memory does not suffice.
            UnsupportedError: the model can't be divided among so many ranks.
            CheckpointError: the folder is not what its config.json says.
            EngineDeadError: another rank died while starting.
        """
        world_size = config.tensor_parallel_size
        rendezvous = free_address(LOOPBACK) if world_size > 1 else None
        worker = Worker(config, model, rank=0, world_size=world_size, rendezvous=rendezvous, progress=progress)
        if worker.device.type == "cuda":
            check_gpus(world_size, torch.cuda.device_count())
        if rendezvous is None:
            worker.initialize()
            return cls(worker)
        control = ControlChannel(LOOPBACK, world_size)
        followers = LocalFollowers(config, model, rendezvous=rendezvous, control_address=control.address)
        try:
            worker.load()
            followers.wait_loaded()
            worker.connect(check=followers.check)
            control.wait_for_followers(check=followers.check)
            return cls(worker, control, followers)
        except BaseException as error:
            cause = followers.failure() if isinstance(error, EngineDeadError) else None
            control.close()
            followers.stop()
            worker.close()
            if cause is not None:
                raise cause from error
            raise

    def execute(self, step: StepInput) -> Tensor:
        """Run one flat batch.

        Returns:
            Fp32 logits [S, vocab_size] of ``step.logits_rows``, on rank 0's device.

        Raises:
            EngineDeadError: with several ranks, the step failed on one of them, or one was lost; there is no going on.
            Exception: with one rank, whatever made the step fail.
        """
        if self._closed or self._failure is not None:
            raise EngineDeadError(self._failure or "the executor was shut down")
        if self._control is None:
            return self._logits(step)
        try:
            self._control.send(step)
            return self._logits(step)
        except Exception as error:
            # Whatever it was, the ranks no longer agree on where they are.
            cause = self._followers.failure() if self._followers is not None else None
            self._failure = str(cause or error)
            raise EngineDeadError(self._failure) from error

    def shutdown(self) -> None:
        """End all ranks and let go of the memory; may be called again."""
        if self._closed:
            return
        self._closed = True
        if self._control is not None:
            self._control.close()
        if self._followers is not None:
            self._followers.stop(grace=0.0 if self._failure else STOP_SECONDS)
        self._worker.close()

    def _logits(self, step: StepInput) -> Tensor:
        logits = self._worker.execute(step)
        if logits is None:
            raise RuntimeError("an executor needs rank 0, which has the logits")
        return logits
