"""Calibration tokens on their way through the layers of a model that is being quantized."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.compress.activations import Activations, DiskActivations, MemoryActivations, available_memory, batches
from engine.compress.layer import LayerWeights, SequenceRunner
from engine.compress.modules import Matrix
from engine.compress.observe import ObserveOptions, Observer, Stage
from engine.compress.sums import StageSums
from engine.config import ModelConfig
from engine.errors import ConfigError

Decode = Callable[[LayerWeights, int], LayerWeights]
"""(weights, layer) -> the same object, its matrices replaced by what the finished layer's bytes mean."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tokens to fit the quantized model to, and how.

    Attributes:
        tokens: int64 [S, L], from :func:`engine.compress.calibration.sequences`.
        observe: what to gather.
        trusted_tokens: from how many tokens on an expert's own statistics are trusted; None: the inputs of its matrix.
        activations: where the hidden states of all tokens are kept. "auto": in memory if they take less than half of
            what is free.
        batch_tokens: tokens that run through a layer at once; at least a sequence.
    """

    tokens: Tensor
    observe: ObserveOptions = field(default_factory=ObserveOptions)
    trusted_tokens: int | None = None
    activations: Literal["auto", "memory", "disk"] = "auto"
    batch_tokens: int = 8192

    def check(self, config: ModelConfig) -> None:
        """Check that the model can read the tokens.

        Raises:
            ConfigError: it can't.
        """
        tokens = self.tokens
        if tokens.dim() != 2 or 0 in tokens.shape or tokens.shape[1] > config.max_position_embeddings:
            raise ConfigError(
                f"calibration tokens {list(tokens.shape)}; expected [sequences, length], length at most the model's "
                f"max_position_embeddings {config.max_position_embeddings}"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.vocab_size:
            raise ConfigError(f"calibration token ids from {low} to {high}; the model has {config.vocab_size}")

    def describe(self) -> dict[str, object]:
        """What the result depends on, by names for people; where activations are kept changes nothing."""
        return {
            "calibration sequences": list(self.tokens.shape),
            "calibration tokens": hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest(),
            "observe options": repr(self.observe),
            "trusted tokens": self.trusted_tokens,
            "batch tokens": self.batch_tokens,
        }


class Flow:
    """The calibration tokens on their way through the quantized layers, and through the original ones if asked for."""

    def __init__(
        self, calibration: Calibration, config: ModelConfig, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._calibration = calibration
        self._config = config
        self._dtype = dtype
        self._device = device
        self._count, length = calibration.tokens.shape
        self._shape = (self._count, length, config.hidden_size)
        self._batch = max(1, calibration.batch_tokens // length)
        self._runner = SequenceRunner(config, length=length, dtype=dtype, device=device)
        self._states = self._store(folder, "inputs")
        self._originals = self._store(folder, "originals") if calibration.observe.match_original else None

    def begin(self, embedding: Tensor, layer: int, read: Callable[[int], LayerWeights], decode: Decode) -> None:
        """Bring the tokens to the entrance of ``layer``.

        Args:
            embedding: the token table.
            layer: the first layer that is not finished.
            read: gives a layer's weights.
            decode: replaces them by a finished layer's.
        """
        start = self._enter(self._states, embedding, layer)
        others = layer if self._originals is None else self._enter(self._originals, embedding, layer)
        for before in range(min(start, others), layer):
            weights = read(before)
            if self._originals is not None and before >= others:
                self._move(self._originals, weights, before)
            if before >= start:
                self._move(self._states, decode(weights, before), before)

    def working_copy(self, original: LayerWeights) -> LayerWeights:
        """The weights to decode finished matrices into; a copy if the original ones are needed beside them."""
        return original if self._originals is None else original.copy()

    def observe(
        self, stage: Stage, matrices: Sequence[Matrix], current: LayerWeights, original: LayerWeights, layer: int
    ) -> StageSums:
        """Run all tokens through the layer and gather what the matrices of a stage are fed with.

        Args:
            stage: which one.
            matrices: of the stage.
            current: the layer's weights, those of earlier stages as quantized.
            original: the layer's weights.
            layer: which one.
        """
        paired = None if self._originals is None else (self._runner.build(original, layer), original)
        observer = Observer(stage, self._runner.build(current, layer), current, paired, self._calibration.observe)
        with torch.no_grad():
            for first in range(0, self._count, self._batch):
                last = min(first + self._batch, self._count)
                states = self._states.read(first, last)
                others = None if self._originals is None else self._originals.read(first, last)
                cache, inputs = self._runner.inputs(len(states))
                observer.add(self._flat(states), None if others is None else self._flat(others), cache, inputs)
        return StageSums(observer, matrices, trusted_tokens=self._calibration.trusted_tokens, device=self._device)

    def advance(self, current: LayerWeights, original: LayerWeights, layer: int) -> None:
        """Move the tokens through the finished layer."""
        if self._originals is not None:
            self._move(self._originals, original, layer)
        self._move(self._states, current, layer)

    def _flat(self, states: Tensor) -> Tensor:
        return states.to(self._device).flatten(0, 1)  # [T, H]

    def _move(self, store: Activations, weights: LayerWeights, layer: int) -> None:
        built = self._runner.build(weights, layer)
        outputs = batches(store, self._count, self._batch, lambda states: self._runner.run(built, states))
        store.advance(layer + 1, outputs)

    def _enter(self, store: Activations, embedding: Tensor, layer: int) -> int:
        """At which layer the tokens are: the one they reached before, or the first."""
        found = store.latest()
        if found is not None and found <= layer:
            return found
        tokens, table = self._calibration.tokens, embedding.to(self._dtype)
        rows = range(0, self._count, self._batch)
        store.advance(0, ((i, table[tokens[i : i + self._batch].to(table.device)]) for i in rows))
        return 0

    def _store(self, folder: Path, name: str) -> Activations:
        if self._on_disk():
            return DiskActivations(folder, self._shape, self._dtype, name=name)
        return MemoryActivations(self._shape, self._dtype)

    def _on_disk(self) -> bool:
        count, length, hidden = self._shape
        size = count * length * hidden * self._dtype.itemsize * (2 if self._calibration.observe.match_original else 1)
        wanted = self._calibration.activations
        return wanted == "disk" or (wanted == "auto" and size > available_memory() // 2)
