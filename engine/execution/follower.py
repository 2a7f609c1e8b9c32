"""The ranks that follow rank 0: run every step it sends, and end when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from multiprocessing.connection import Connection

import msgspec

from engine.config import EngineConfig, ModelConfig
from engine.errors import DibitError
from engine.execution.control import ControlClient
from engine.execution.messages import Failed, Loaded
from engine.execution.worker import Worker


def follow(worker: Worker, control_address: str) -> None:
    """Be a follower: run every step that rank 0 sends, until it says that the engine ends.

    Args:
        worker: initialized, of any rank but 0.
        control_address: `ControlChannel.address` of rank 0.

    Raises:
        EngineDeadError: rank 0 is gone.
        Exception: whatever made the step fail; the rank is of no more use then.
    """
    client = ControlClient(control_address, worker.group.rank)
    try:
        while (step := client.receive()) is not None:
            worker.execute(step)
    finally:
        client.close()
        worker.close()


def run_follower(
    config: EngineConfig, model: ModelConfig, rank: int, rendezvous: str, control_address: str, pipe: Connection
) -> None:
    """The life of a follower process of `engine.execution.launch`.

    Args:
        config: the engine's.
        model: the engine's.
        rank: of this process.
        rendezvous: where the ranks meet.
        control_address: rank 0's control channel.
        pipe: to the process of rank 0, for `Loaded` or `Failed`; the process ends when it closes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for rank 0 to handle
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        worker = Worker(config, model, rank=rank, world_size=config.tensor_parallel_size, rendezvous=rendezvous)
        worker.load()
        pipe.send_bytes(msgspec.msgpack.encode(Loaded()))
        worker.connect()
        follow(worker, control_address)
    except Exception as error:
        text = str(error) if isinstance(error, DibitError) else traceback.format_exc()
        with contextlib.suppress(OSError):  # rank 0 may be gone, then nobody is left to tell
            pipe.send_bytes(msgspec.msgpack.encode(Failed(type(error).__name__, text)))
        # Not sys.exit: what is left of the failed step, such as a collective, must not hold the process back.
        os._exit(1)


def _end_with_parent(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()
    os._exit(1)
