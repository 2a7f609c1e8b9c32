"""From a step's arrays to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.execution.batch import StepInput
from engine.execution.kv_cache import KVCache
from engine.models import DecoderModel
from kernels import ops


class ModelRunner:
    """Runs flat batches of one rank's model over one rank's cache.

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

    @torch.inference_mode()
    def run(self, step: StepInput) -> Tensor | None:
        """Fp32 logits [S, vocab_size] on rank 0, None elsewhere."""
        metadata = ops.attention_metadata(
            step.block_tables,
            step.query_start,
            step.context_lens,
            block_size=self.cache.block_size,
            dtype=self.dtype,
            device=self.device,
        )
        return self.model(
            torch.from_numpy(step.token_ids).to(self.device),
            torch.from_numpy(step.positions).to(self.device),
            self.cache.layers,
            slot_mapping=torch.from_numpy(step.slot_mapping).to(self.device),
            metadata=metadata,
            logits_rows=torch.from_numpy(step.logits_rows).to(self.device),
        )
