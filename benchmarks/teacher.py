"""Teacher-forced comparison of a quantized model with its original: divergence, agreement, perplexity.

Both run in the engine, as a server would run them, over the same windows of text.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.execution.batch import StepInput, dummy_step
from engine.execution.worker import Worker


class Teacher:
    """A model that is shown whole windows of text. Close it when done.

    Args:
        config: of an engine whose steps hold one window, which is one block of its cache.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._worker = Worker(config, ModelConfig.from_folder(config.model))
        self._worker.initialize()
        length = config.max_num_batched_tokens
        self._step: StepInput = dataclasses.replace(
            dummy_step(length, 1, length), logits_rows=np.arange(length, dtype=np.int32)
        )

    def log_probabilities(self, window: Tensor) -> Tensor:
        """Int [L] -> fp32 [L, vocab_size], of the token after each."""
        logits = self._worker.execute(dataclasses.replace(self._step, token_ids=window.to(torch.int32).numpy()))
        if logits is None:
            raise RuntimeError("logits are on rank 0, and this is it")
        return logits.log_softmax(dim=-1)

    def close(self) -> None:
        """Let go of the memory."""
        self._worker.close()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A quantized model beside its original.

    Attributes:
        perplexity: of the quantized model.
        divergence: KL(original || quantized) in nats a token.
        divergence_error: standard error of the divergence, windows being the sample.
        agreement: part of the positions at which both find the same token likeliest.
        windows: divergence of every window, for paired tests between methods.
    """

    perplexity: float
    divergence: float
    divergence_error: float
    agreement: float
    windows: list[float]


def compare(original: Teacher, quantized: Teacher, windows: Tensor) -> Comparison:
    """Run both over ``windows`` [S, L]; a window's last position predicts nothing and does not count."""
    divergences, agreed, nats = [], 0, 0.0
    for window in windows:
        p, q = original.log_probabilities(window)[:-1], quantized.log_probabilities(window)[:-1]  # [L - 1, V]
        divergences.append(float((p.exp() * (p - q)).sum(dim=-1).double().mean()))
        agreed += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        nats -= float(q.gather(-1, window[1:, None].long()).double().sum())
    count = windows.shape[0] * (windows.shape[1] - 1)
    sample = torch.tensor(divergences, dtype=torch.float64)
    return Comparison(
        perplexity=math.exp(nats / count),
        divergence=float(sample.mean()),
        divergence_error=float(sample.std()) / math.sqrt(len(sample)),
        agreement=agreed / count,
        windows=divergences,
    )
