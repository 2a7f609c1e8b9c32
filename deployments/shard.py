"""Shard: the Ray actor of one tensor-parallel rank; shard 0 also runs the engine."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from deployments.mailbox import Outbox
from deployments.progress import LoadingProgress, log_to_stderr
from deployments.token_stream import Fanout
from engine.checkpoint.hub import resolve_model
from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.messages import EngineLoad, EngineRequest

if TYPE_CHECKING:  # torch comes with these; a replica, which imports this file too, has no use for it
    from engine.execution.control import ControlChannel
    from engine.execution.worker import Worker
    from engine.loop import EngineLoop

logger = logging.getLogger("deployments.shard")


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of one engine meet; both are ``tcp://host:port`` on shard 0's node."""

    rendezvous: str
    """For torch.distributed."""
    control: str
    """For the steps that shard 0 sends to the others."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What shard 0 knows once the model is loaded; lengths are in tokens."""

    max_model_len: int
    block_size: int
    num_kv_blocks: int
    identity: str
    """Of the model, see ``deployments.identity``."""


class Shard:
    """One rank. Its owner, the EngineReplica, starts it, watches it and takes it along when it goes.

    All methods run on the actor's event loop; the model runs in a thread of its own.
    """

    def __init__(self, config: EngineConfig, *, rank: int) -> None:
        """Made by Ray, on the actor's event loop; nothing is loaded yet."""
        log_to_stderr()
        self._config = config
        self._rank = rank
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._control: ControlChannel | None = None
        self._worker: Worker | None = None
        self._engine: EngineLoop | None = None
        self._fanout: Fanout | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def meeting(self) -> Meeting:
        """Shard 0: open the control channel, and say where the others find it."""
        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray's
        from deployments import rank

        self._control, meeting = rank.open_control(host, self._config)
        return meeting

    async def load(self, meeting: Meeting | None, served_model_name: str) -> None:
        """Read this rank's share of the weights; ``meeting`` is None where there is one rank.

        Raises:
            DibitError: the model or the options are wrong; the text is for the user.
        """
        progress = LoadingProgress(served_model_name, speaks=self._rank == 0)
        folder = await asyncio.to_thread(resolve_model, self._config.model)
        self._config = self._config.model_copy(update={"model": str(folder)})
        from deployments import rank

        self._worker = rank.make_worker(self._config, rank=self._rank, meeting=meeting, progress=progress)
        await asyncio.to_thread(self._worker.load)
        progress.done()

    async def join(self, meeting: Meeting | None) -> EngineInfo | None:
        """Meet the other ranks, when all have loaded; on shard 0 the engine runs when this returns.

        Returns:
            What shard 0 knows of the engine; None from the others, which follow its steps from here on.

        Raises:
            DibitError: memory does not suffice, or another rank did not come.
        """
        from deployments import rank

        worker, fail = self._loaded(), self._fail_from_thread
        await asyncio.to_thread(worker.connect)
        if self._rank == 0:
            running = rank.run_engine(self._config, worker, self._control, loop=self._loop, on_error=fail)
            self._engine, self._fanout = running.engine, running.fanout
            return running.info
        if meeting is not None:
            following = (worker, meeting.control, fail)
            threading.Thread(target=rank.follow_until_it_ends, args=following, name="rank", daemon=True).start()
        return None

    async def watch(self, tether: list[ObjectRef[None]]) -> None:
        """Never returns; raises when this rank can't go on, and fails when its process dies.

        Args:
            tether: an object of the owner's that never comes to be, see :meth:`tether`. Ray's head node ends the shards
                of a dead owner; where it is not there to do so, the loss of this object does.

        Raises:
            EngineDeadError: the engine or a collective operation failed.
        """
        self._spawn(self._outlive_nobody(tether))
        await self._failed

    async def tether(self) -> None:
        """Never returns. The result belongs to the caller's process, so its loss tells of that process's death."""
        await asyncio.Event().wait()

    async def submit(self, ingress_id: str, requests: list[EngineRequest]) -> None:
        """Shard 0: queue requests; their tokens go to the stream of that ingress.

        Raises:
            EngineDeadError: the engine has stopped, or the ingress has no open stream.
        """
        engine, fanout = self._running()
        fanout.claim(ingress_id, requests)
        engine.submit(requests)

    async def abort(self, request_ids: list[str]) -> None:
        """Shard 0: forget requests and free their blocks."""
        engine, fanout = self._running()
        fanout.release(request_ids)
        engine.abort(request_ids)

    async def stream(self, ingress_id: str, tether: list[ObjectRef[None]]) -> AsyncGenerator[bytes, None]:
        """Shard 0: all that concerns one ingress, one encoded ``token_stream.Item`` a step; the first comes at once.

        When the stream is cancelled, or the ingress's process dies, its requests are aborted.

        Args:
            ingress_id: name of the ingress, another for each stream that it opens.
            tether: an object of its own that never comes to be, see :meth:`tether`.
        """
        _, fanout = self._running()
        outbox = fanout.open(ingress_id)
        watcher = self._spawn(self._leave_with(ingress_id, outbox, tether))
        try:
            async for item in outbox.items():
                yield item
        finally:
            watcher.cancel()
            self._leave(ingress_id, outbox)

    async def under_way(self, names: list[str]) -> list[str]:
        """Shard 0: as :meth:`Fanout.under_way`, for the owner to end leases."""
        _, fanout = self._running()
        return fanout.under_way(names)

    async def seconds_since_progress(self) -> float:
        """Shard 0: seconds since the engine finished a step or showed a heartbeat."""
        engine, _ = self._running()
        return time.monotonic() - engine.last_progress

    async def load_now(self) -> EngineLoad:
        """Shard 0: the engine's load after its last step."""
        _, fanout = self._running()
        return fanout.load

    async def check(self) -> EngineLoad:
        """Shard 0: check the engine's books between two steps, see :meth:`EngineCore.check`; its load then.

        Raises:
            RuntimeError: an invariant doesn't hold.
        """
        from deployments import rank

        engine, _ = self._running()
        return await asyncio.wrap_future(engine.call(rank.checked))

    async def whereabouts(self) -> tuple[str, int]:
        """The node and the process that this rank is in."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def is_there(self) -> None:
        """Answers, which tells that the process is alive."""

    async def expert_load(self) -> dict[int, list[int]] | None:
        """By MoE layer, the tokens that each routed expert has had so far; None where nobody counts them."""
        return None if self._worker is None else await asyncio.to_thread(self._worker.expert_load)

    def _loaded(self) -> Worker:
        if self._worker is None:
            raise EngineDeadError(f"rank {self._rank} was asked to join before it had loaded")
        return self._worker

    def _fail_from_thread(self, failure: EngineDeadError) -> None:
        self._loop.call_soon_threadsafe(self._fail, failure)

    def _fail(self, failure: EngineDeadError) -> None:
        logger.error("rank %d: %s", self._rank, failure, exc_info=failure.__cause__)
        if self._fanout is not None:
            self._fanout.fail(failure)
        if not self._failed.done():
            self._failed.set_exception(failure)

    def _running(self) -> tuple[EngineLoop, Fanout]:
        if self._engine is None or self._fanout is None:
            raise EngineDeadError(f"rank {self._rank} runs no engine; ask shard 0 once it has started")
        return self._engine, self._fanout

    def _leave(self, ingress_id: str, outbox: Outbox) -> None:
        engine, fanout = self._running()
        engine.abort(fanout.leave(ingress_id, outbox))

    async def _leave_with(self, ingress_id: str, outbox: Outbox, tether: list[ObjectRef[None]]) -> None:
        await _loss_of(tether)
        self._leave(ingress_id, outbox)

    async def _outlive_nobody(self, tether: list[ObjectRef[None]]) -> None:
        await _loss_of(tether)
        logger.error("rank %d ends: the replica that owns it is gone", self._rank)
        os._exit(1)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _loss_of(tether: list[ObjectRef[None]]) -> None:
    """Wait until the owner of the object is gone."""
    with suppress(RayError):
        await tether[0]
