"""What a shard's process runs: its rank's model, and on rank 0 the engine.

Apart from ``deployments.shard``, because this wants torch, and the processes that only start and watch shards do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from deployments.identity import ModelIdentity
from deployments.progress import LoadingProgress
from deployments.shard import EngineInfo, Meeting
from deployments.token_stream import Fanout
from engine.config import EngineConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import EngineDeadError
from engine.execution.control import ControlChannel
from engine.execution.executor import Executor
from engine.execution.follower import follow
from engine.execution.parallel import free_address
from engine.execution.worker import Worker
from engine.loop import EngineLoop
from engine.messages import EngineLoad
from engine.structured.compiler import GrammarCompiler
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Running:
    """The engine of rank 0, and where its tokens go."""

    engine: EngineLoop
    fanout: Fanout
    info: EngineInfo


def open_control(host: str, config: EngineConfig) -> tuple[ControlChannel, Meeting]:
    """Rank 0: the channel to the others, and where they find it."""
    control = ControlChannel(host, config.tensor_parallel_size)
    return control, Meeting(rendezvous=free_address(host), control=control.address)


def make_worker(config: EngineConfig, *, rank: int, meeting: Meeting | None, progress: LoadingProgress) -> Worker:
    """The rank's worker, with nothing loaded yet; ``config.model`` is a folder.

    Raises:
        DibitError: the model or the options are wrong; the text is for the user.
    """
    return Worker(
        config,
        ModelConfig.from_folder(config.model),
        rank=rank,
        world_size=config.tensor_parallel_size,
        rendezvous=meeting.rendezvous if meeting else None,
        progress=progress,
    )


def run_engine(
    config: EngineConfig,
    worker: Worker,
    control: ControlChannel | None,
    *,
    loop: asyncio.AbstractEventLoop,
    on_error: Callable[[EngineDeadError], None],
) -> Running:
    """Rank 0: start the engine in a thread of its own.

    Args:
        config: how it runs.
        worker: connected.
        control: to the other ranks; None where there are none.
        loop: of the actor, where streams are read.
        on_error: told, from the engine's thread, why it has stopped.
    """
    tokenizer = Tokenizer.from_folder(config.model)
    executor = Executor(worker, control)
    core = EngineCore(
        config,
        worker.model,
        executor,
        used_vocab_size=tokenizer.used_vocab_size,
        eos_token_ids=tokenizer.eos_token_ids,
        grammars=GrammarCompiler.of(tokenizer, vocab_size=worker.model.vocab_size),
    )
    fanout = Fanout(loop, core.load())
    engine = EngineLoop(core, on_step=fanout.publish, on_error=on_error)
    engine.start()
    identity = ModelIdentity.of(worker.model, tokenizer).digest
    info = EngineInfo(executor.max_model_len, executor.block_size, executor.num_kv_blocks, identity)
    return Running(engine, fanout, info)


def follow_until_it_ends(worker: Worker, control: str, on_end: Callable[[EngineDeadError], None]) -> None:
    """Another rank than 0, in a thread of its own: do what shard 0 says until it stops, and tell why."""
    try:
        follow(worker, control)
        failure = EngineDeadError("shard 0 has ended")
    except Exception as error:  # nobody above this thread would hear of it
        failure = EngineDeadError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
    on_end(failure)


def checked(core: EngineCore) -> EngineLoad:
    """The load of an engine whose books are right, see :meth:`EngineCore.check`."""
    core.check()
    return core.load()
