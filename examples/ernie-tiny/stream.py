"""Endless packed token sequences: an epoch's documents one after another, cut in blocks, the blocks shuffled."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 2048


class Stream:
    """Blocks of BLOCK + 1 tokens from the documents of `epoch(number)`; `position` is all its state."""

    def __init__(self, epoch: Callable[[int], list[list[int]]], *, seed: int) -> None:
        self.epoch = epoch
        self.seed = seed
        self.position = (0, 0)
        self._number = -1
        self._blocks: list[Tensor] = []

    def _prepare(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        documents = self.epoch(number)
        rng.shuffle(documents)
        tokens = torch.tensor([token for document in documents for token in document], dtype=torch.long)
        start = rng.randrange(BLOCK)  # so that another epoch cuts elsewhere
        self._blocks = [tokens[i : i + BLOCK + 1] for i in range(start, len(tokens) - BLOCK, BLOCK)]
        rng.shuffle(self._blocks)
        self._number = number

    def take(self) -> Tensor:
        """The next block [BLOCK + 1]: BLOCK inputs, and the targets one further."""
        number, index = self.position
        if number != self._number:
            self._prepare(number)
        block = self._blocks[index]
        self.position = (number, index + 1) if index + 1 < len(self._blocks) else (number + 1, 0)
        return block
