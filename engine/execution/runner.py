"""From a step's arrays to logits."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.execution.batch import StepInput
from engine.execution.graphs import Capture, DecodeGraphs
from engine.execution.kv_cache import KVCache
from engine.execution.padding import DecodeBatch, DecodeBuffers
from engine.models import DecoderModel
from kernels import ops


class ModelRunner:
    """Runs flat batches of one rank's model over one rank's cache.

    Nothing here waits for the device: arrays go to a GPU from pinned memory, and the logits stay there.

    Args:
        model: the rank's share of the model.
        cache: the rank's share of the key-value cache.
        dtype: compute dtype.
        device: compute device.
    """

    def __init__(self, model: DecoderModel, cache: KVCache, *, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.dtype = dtype
        self.device = device
        self.graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def capture(
        self, how: Capture, sizes: tuple[int, ...], *, max_blocks: int, only: tuple[int, ...] | None = None
    ) -> None:
        """Let decode steps of up to ``sizes[-1]`` requests run as graphs; the cache's last block is theirs from now on.

        Args:
            how: `engine.execution.graphs.CudaCapture`.
            sizes: batch sizes, ascending.
            max_blocks: blocks of the longest sequence.
            only: those of `sizes` to capture; by default all.

        Raises:
            ConfigError: a step can't be captured.
            torch.OutOfMemoryError: there is no memory for it.
        """
        block, block_size = self.cache.num_blocks - 1, self.cache.block_size
        buffers = DecodeBuffers(sizes[-1], max_blocks, block=block, block_size=block_size, device=self.device)
        # Not a method of the runner: that would be a cycle, and weights, cache and graphs would stay on the GPU after
        # `Worker.close` until the garbage collector happens to run, which knows nothing of a GPU's memory.
        forward = functools.partial(_decode, self.model, self.cache, self.dtype)
        graphs = DecodeGraphs(forward, buffers, sizes=sizes, max_blocks=max_blocks, block=block, block_size=block_size)
        graphs.capture(how, only)
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, step: StepInput) -> Tensor | None:
        """Fp32 logits [S, vocab_size] on rank 0, None elsewhere; those of a decode step are valid until the next."""
        size = None if self.graphs is None else self.graphs.size_for(step)
        if self.graphs is not None and size is not None:
            return self.graphs.run(step, size)
        metadata = ops.attention_metadata(
            step.block_tables,
            step.query_start,
            step.context_lens,
            block_size=self.cache.block_size,
            dtype=self.dtype,
            device=self.device,
        )
        return self.model(
            self._to_device(step.token_ids),
            self._to_device(step.positions),
            self.cache.layers,
            slot_mapping=self._to_device(step.slot_mapping),
            metadata=metadata,
            logits_rows=self._to_device(step.logits_rows),
        )

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def _decode(model: DecoderModel, cache: KVCache, dtype: torch.dtype, batch: DecodeBatch) -> Tensor | None:
    """One token a request, and logits of each; no value on the device decides what is done."""
    metadata = ops.decode_metadata(
        batch.block_tables, batch.query_start, batch.context_lens, block_size=cache.block_size, dtype=dtype
    )
    return model(
        batch.token_ids,
        batch.positions,
        cache.layers,
        slot_mapping=batch.slot_mapping,
        metadata=metadata,
        logits_rows=batch.query_start[:-1],
    )
