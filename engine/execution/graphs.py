"""Decode steps as CUDA graphs: one launch in place of the thousand of a deep model.

A decoding GPU waits for the host wherever a kernel takes less time than its launch. A graph, captured once for each of
a few batch sizes, replays all of a step's kernels on buffers that never move (`engine.execution.padding`). Every rank
takes the size from the step's arrays alone, so all replay the same graph, collective operations included. On a CPU the
same is done with recorded steps (`ops.record`), as preparing a small kernel takes longer than running it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution.batch import StepInput
from engine.execution.padding import DecodeBatch, DecodeBuffers, choose_size, is_decode, pad
from kernels import choice

logger = logging.getLogger(__name__)

SMALL_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12)
"""Below 16 tokens, a batch leaves many experts untouched, and those that only padding asks for cost their bytes."""
SIZE_STEP = 8
LARGEST_CPU_SIZE = 8
"""A CPU pads nothing, as every row costs it time, and with more requests its kernels take long enough."""
LARGEST_SIZE = 512
"""Beyond it, a step takes long enough that launching its kernels does not matter."""
PROGRESS_SECONDS = 2.0


def cpu_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to record on a CPU, ascending."""
    return tuple(range(1, min(max_num_seqs, LARGEST_CPU_SIZE) + 1))


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending: 1 ... 8, 12, then multiples of 8, and `max_num_seqs` itself up to 512."""
    largest = min(max_num_seqs, LARGEST_SIZE)
    sizes = (*SMALL_SIZES, *range(2 * SIZE_STEP, largest, SIZE_STEP), largest)
    return tuple(sorted({size for size in sizes if size <= largest}))


def graph_sizes(config: EngineConfig, device: torch.device, dtype: torch.dtype, world_size: int) -> tuple[int, ...]:
    """Batch sizes whose decode steps are captured or recorded, ascending; none where that can't be, or isn't wanted."""
    if config.enforce_eager:
        return ()
    if device.type == "cpu":  # whose sums over ranks can't be recorded, nor its attention in another dtype
        return cpu_sizes(config.max_num_seqs) if world_size == 1 and dtype == torch.float32 else ()
    reason = choice.why_not_captured(device)
    if reason is not None:
        logger.warning("decoding without CUDA graphs: %s", reason)
        return ()
    return capture_sizes(config.max_num_seqs)


class Capture(Protocol):
    """Makes something that can be done again and again of something done once."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """What repeats `run`, on the same memory."""


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory, as no two of them run at once.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once as it is, which compiles kernels and makes workspaces, and once to record."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": NCCL's watchdog thread queries events meanwhile, which would spoil a "global" capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


class DecodeGraphs:
    """A graph for each batch size, and the steps that fit one.

    Args:
        forward: n requests of one token -> fp32 logits [n, vocab_size] on rank 0, None elsewhere.
        buffers: for the largest of `sizes`.
        sizes: batch sizes, ascending.
        max_blocks: blocks of the longest sequence, the width of the buffers' tables.
        block: a block of the cache that no request owns.
        block_size: tokens in a block.
    """

    def __init__(
        self,
        forward: Callable[[DecodeBatch], Tensor | None],
        buffers: DecodeBuffers,
        *,
        sizes: Sequence[int],
        max_blocks: int,
        block: int,
        block_size: int,
    ) -> None:
        self.sizes = tuple(sizes)
        self._forward = forward
        self._buffers = buffers
        self._max_blocks = max_blocks
        self._block = block
        self._block_size = block_size
        self._replays: dict[int, Callable[[], None]] = {}
        self._captured: tuple[int, ...] = ()
        self._logits: Tensor | None = None

    def capture(self, how: Capture, sizes: Sequence[int] | None = None) -> None:
        """Capture the given sizes, by default all; the largest first, whose memory the others then use too.

        Raises:
            ConfigError: the model does something in a step that can't be captured.
            torch.OutOfMemoryError: there is no memory for it.
        """
        wanted = sorted(self.sizes if sizes is None else sizes, reverse=True)
        started = spoken = time.monotonic()
        for done, size in enumerate(wanted, start=1):
            try:
                self._replays[size] = how(self._run(size))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ConfigError(
                    f"a decode step of {size} requests can't be captured ({error}); "
                    "enforce_eager: true runs without graphs"
                ) from error
            self._captured = tuple(sorted(self._replays))
            if time.monotonic() - spoken > PROGRESS_SECONDS:
                spoken = time.monotonic()
                logger.info("captured %d of %d decode steps", done, len(wanted))
        logger.info("captured %d decode steps in %.1f s", len(wanted), time.monotonic() - started)

    def size_for(self, step: StepInput) -> int | None:
        """The captured size that runs `step`; None if it has to run without a graph."""
        if not is_decode(step) or step.block_tables.shape[1] > self._max_blocks:
            return None
        return choose_size(len(step.token_ids), self._captured)

    def run(self, step: StepInput, size: int) -> Tensor | None:
        """Replay: fp32 logits [S, vocab_size], valid until the next call, on rank 0, None elsewhere."""
        self._buffers.load(pad(step, size, block=self._block, block_size=self._block_size))
        self._replays[size]()
        if self._logits is None:
            return None
        wanted = len(step.logits_rows)
        if wanted == len(step.token_ids):
            return self._logits[:wanted]
        return self._logits[torch.from_numpy(step.logits_rows).to(self._logits.device)]

    def _run(self, size: int) -> Callable[[], None]:
        """A decode step of `size` requests, from the buffers into the logits that all sizes share."""
        batch = self._buffers.view(size)

        def run() -> None:
            logits = self._forward(batch)
            if logits is None:
                return
            if self._logits is None:  # in the first run, which is the largest and not recorded
                self._logits = torch.empty_like(logits)
            self._logits[:size].copy_(logits)

        return run
