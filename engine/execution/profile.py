"""Measures what a rank's steps take of its GPU, before the KV cache gets the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution.batch import dummy_step
from engine.execution.graphs import CudaCapture
from engine.execution.memory import GpuMemory, describe
from engine.execution.runner import ModelRunner
from engine.execution.sampler import sampling_bytes

logger = logging.getLogger(__name__)


def profile(
    make_runner: Callable[[int], ModelRunner],
    config: EngineConfig,
    device: torch.device,
    *,
    block_bytes: int,
    graph_sizes: tuple[int, ...],
    max_blocks: int,
    vocab_size: int,
) -> GpuMemory:
    """Run the largest step, and capture the two largest graphs, over a cache that is just large enough.

    Sampling is not run, but counted: it comes after the step, whose memory it may use.

    All ranks do this together, as their steps meet in collective operations.

    Args:
        make_runner: makes a runner with a cache of so many blocks.
        config: how the engine runs.
        device: the rank's GPU, with the weights on it.
        block_bytes: of a block of the cache.
        graph_sizes: batch sizes that will be captured; empty for none.
        max_blocks: blocks of the longest sequence.
        vocab_size: logits of a sequence.

    Raises:
        ConfigError: there is no memory for it.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    weights = torch.cuda.memory_allocated(device)
    other = total - free - weights
    step = dummy_step(config.max_num_batched_tokens, config.max_num_seqs, config.block_size)
    runner = make_runner(step.block_tables.size + 1)  # and the block of the graphs
    cache_bytes = runner.cache.num_blocks * block_bytes
    try:
        torch.cuda.reset_peak_memory_stats(device)
        runner.run(step)
        torch.cuda.synchronize(device)
        step_bytes = torch.cuda.max_memory_allocated(device) - weights - cache_bytes
        graphs = _graph_bytes(runner, graph_sizes, max_blocks, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of max_num_batched_tokens {config.max_num_batched_tokens} and max_num_seqs {config.max_num_seqs} "
            f"does not fit beside {weights / 1e9:,.2f} GB of weights in {device}, which has {total / 1e9:,.2f} GB "
            f"({error}); lower either, or raise tensor_parallel_size (now {config.tensor_parallel_size})"
        ) from error
    finally:
        del runner
        torch.cuda.empty_cache()
    if graph_sizes:
        graphs += block_bytes
    activations = max(step_bytes, sampling_bytes(config, vocab_size))
    memory = GpuMemory(total=total, weights=weights, other=other, activations=activations, graphs=graphs)
    logger.info("%s of %.2f GB: %s", device, total / 1e9, describe(memory))
    return memory


def _graph_bytes(runner: ModelRunner, sizes: tuple[int, ...], max_blocks: int, device: torch.device) -> int:
    """Bytes of all graphs, from the largest, whose memory they share, and the next, which is what each costs on top."""
    if not sizes:
        return 0
    taken = []
    for only in (sizes[-1:], sizes[-2:]):
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info(device)
        runner.capture(CudaCapture(device), sizes, max_blocks=max_blocks, only=only)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what the runs before the recording took
        after, _ = torch.cuda.mem_get_info(device)
        taken.append(max(0, before - after))
        runner.graphs = None
    first, both = taken
    return first + max(0, both - first) * (len(sizes) - 1)
