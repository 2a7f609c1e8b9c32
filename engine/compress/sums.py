"""The metric and the target of every matrix of a stage, from what the calibration tokens showed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.compress.gram import Gram, blended, total
from engine.compress.hessian import Metric
from engine.compress.modules import Matrix
from engine.compress.observe import Observer
from engine.errors import ConfigError

_NAMED_EXPERTS = 8


class StageSums:
    """What an observer gathered, asked for once for each matrix of its stage, in their order.

    An expert that too few tokens chose has sums of low rank, under which most of its weights would not matter. They
    are blended with those of all experts of the layer.

    Args:
        observer: after it has seen all tokens.
        matrices: of the stage.
        trusted_tokens: from so many tokens on an expert's sums count alone; None: as many as its matrix has inputs.
        device: where to compute.
    """

    def __init__(
        self, observer: Observer, matrices: Sequence[Matrix], *, trusted_tokens: int | None, device: torch.device
    ) -> None:
        self._observer = observer
        self._matrices = matrices
        self._trusted_tokens = trusted_tokens
        self._device = device
        self._uses = Counter(observer.key(matrix) for matrix in matrices)
        self._ready: dict[str, tuple[Gram, Metric]] = {}
        self._of_all: Gram | None = None

    def take(self, matrix: Matrix, weight: Tensor) -> tuple[Tensor, Metric]:
        """What to approximate, [N, K] like ``weight``, and in which metric; the sums go after their last use.

        Raises:
            ConfigError: an activation was not finite.
        """
        key = self._observer.key(matrix)
        if key not in self._ready:
            gram = self._sums(matrix)
            try:
                self._ready[key] = gram, gram.metric(matrix.k, device=self._device)
            except ConfigError as error:
                raise ConfigError(f"{matrix.module}: {error}") from None
        gram, metric = self._ready[key]
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._ready[key]
        return gram.target(weight), metric

    def warnings(self) -> list[str]:
        """Which experts saw too few tokens, one sentence for all of the layer."""
        starved = {
            matrix.expert: gram.tokens
            for matrix in self._matrices
            if self._is_own(matrix) and (gram := self._observer.gram(matrix)).tokens < self._needed(matrix)
        }
        if not starved:
            return []
        layer = self._matrices[0].module.split(".")[1]
        needed = max(self._needed(matrix) for matrix in self._matrices if self._is_own(matrix))
        some = sorted(starved.items(), key=lambda item: item[1])[:_NAMED_EXPERTS]
        named = ", ".join(f"{expert} ({tokens})" for expert, tokens in some)
        return [
            f"layer {layer}: {len(starved)} experts saw fewer than {needed} calibration tokens: {named}"
            f"{', …' if len(starved) > len(some) else ''}; their errors are measured by other experts' tokens too"
        ]

    def _sums(self, matrix: Matrix) -> Gram:
        gram = self._observer.gram(matrix)
        if not self._is_own(matrix):
            return gram
        if self._of_all is None:
            own = [other for other in self._matrices if self._is_own(other)]
            self._of_all = total([self._observer.gram(other) for other in own])
        return blended(gram, self._of_all, needed=self._needed(matrix))

    def _is_own(self, matrix: Matrix) -> bool:
        """Whether the matrix is an expert's and has sums of its own."""
        return matrix.expert is not None and self._observer.key(matrix) != "mlp"

    def _needed(self, matrix: Matrix) -> int:
        return matrix.k if self._trusted_tokens is None else self._trusted_tokens
