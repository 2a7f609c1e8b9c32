"""Steps of nobody's tokens before the first request, so that no request waits for a compiler.

A GPU's kernels are compiled when they are first launched, again for each of several sizes of steps, and each takes
seconds: in a running engine everybody would wait for one of them, on all ranks. So a few steps of the sizes that make
a difference (`kernels.choice.launch_sizes`) are run once the cache is there. Triton keeps what it compiled on disk, and
a later start only loads it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.execution.batch import StepInput, nobodys_step
from engine.execution.runner import ModelRunner
from engine.scheduling.scheduler import MAX_PROMPT_ROWS
from kernels import choice

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0


def warm_up(
    runner: ModelRunner, config: EngineConfig, model: ModelConfig, *, max_model_len: int, num_blocks: int
) -> None:
    """Run them, where anything is compiled by size; all ranks do it together, as steps meet in collective operations.

    The cache is as it was before, and what the steps took of the GPU is given back.

    Args:
        runner: whose cache nobody uses yet.
        config: how the engine runs.
        model: what it runs.
        max_model_len: tokens of the longest sequence.
        num_blocks: of the cache that requests may have, the same on all ranks.

    Raises:
        ConfigError: there is no memory for such steps beside the cache.
    """
    steps = warmup_steps(config, model, runner.device, max_model_len=max_model_len, num_blocks=num_blocks)
    if not steps:
        return
    try:
        _run(runner.run, steps)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of max_num_batched_tokens {config.max_num_batched_tokens} and max_num_seqs {config.max_num_seqs} "
            f"does not fit into {runner.device} beside weights and {num_blocks} blocks of KV cache ({error}); lower "
            f"either, or gpu_memory_utilization (now {config.gpu_memory_utilization}), or num_kv_blocks if it is set"
        ) from error
    runner.cache.clear()
    torch.cuda.empty_cache()  # graphs have memory of their own


def warmup_steps(
    config: EngineConfig, model: ModelConfig, device: torch.device, *, max_model_len: int, num_blocks: int
) -> list[StepInput]:
    """The steps for an engine of such limits, the largest first, whose memory the others then use.

    The same on all ranks. None where nothing is compiled by size.
    """
    # Each token of a step has a slot of its own, and no sequence is longer than the longest.
    tokens = min(config.max_num_batched_tokens, config.max_num_seqs * max_model_len, num_blocks * config.block_size)
    sizes = choice.launch_sizes(
        device,
        max_tokens=tokens,
        max_context=-(-max_model_len // config.block_size) * config.block_size,  # graphs count whole blocks
        top_k=model.moe.num_experts_per_token if model.moe else 0,
        experts=model.moe.num_experts if model.moe else 0,
    )
    if sizes is None:
        return []
    most_rows = config.max_num_seqs + MAX_PROMPT_ROWS

    def step(counts: Sequence[int], past: int = 0) -> StepInput:
        # The most logits there can be, but not in the largest steps: those were profiled without a prompt's.
        rows = sum(counts) if sum(counts) <= most_rows else config.max_num_seqs
        return nobodys_step(counts, past=past, block_size=config.block_size, num_blocks=num_blocks, num_rows=rows)

    steps = [
        # Of as many sequences as there may be, or of as few.
        step([1] * count if count <= config.max_num_seqs else _prompts(count, max_model_len))
        for count in sorted({*sizes.tokens, min(tokens, most_rows)}, reverse=True)
    ]
    prompt = min(sizes.queries, tokens, max_model_len)
    return [*steps, step([prompt]), *(step([1], past=context - 1) for context in reversed(sizes.contexts))]


def _run(run: Callable[[StepInput], object], steps: Sequence[StepInput]) -> None:
    started = spoken = time.monotonic()
    for done, step in enumerate(steps, start=1):
        run(step)
        if time.monotonic() - spoken > PROGRESS_SECONDS:
            spoken = time.monotonic()
            logger.info("compiling kernels: %d of %d steps", done, len(steps))
    logger.info("compiled kernels for steps of all sizes in %.1f s", time.monotonic() - started)


def _prompts(tokens: int, longest: int) -> list[int]:
    """Of as many tokens as `longest`, but for the last."""
    whole, rest = divmod(tokens, longest)
    return [longest] * whole + [rest] * bool(rest)
