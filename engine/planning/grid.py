"""Memory by format and context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.planning.cards import Card
from engine.planning.layouts import Layout
from engine.planning.plan import Demand, fits, least

CONTEXTS = tuple(1024 * 2**power for power in range(8))
"""1K to 128K."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid: bytes of one card.

    Attributes:
        layout: the format.
        context: tokens of each sequence.
        tensor_parallel_size: of the format, the same at all contexts.
        weights: of the card's rank.
        cache: of the sequences.
        rest: of the largest step, CUDA graphs and CUDA itself.
    """

    layout: str
    context: int
    tensor_parallel_size: int
    weights: int
    cache: int
    rest: int

    @property
    def total(self) -> int:
        """All that the card must hold."""
        return self.weights + self.cache + self.rest


def grid(
    model: ModelConfig, layouts: Iterable[Layout], demand: Demand, cards: Sequence[Card], engine: EngineConfig
) -> list[Cell]:
    """Each format at all `CONTEXTS` that the model has.

    Its tensor-parallel size is the least that holds the demand on the largest of the cards, or the largest there is.
    """
    largest = max(cards, key=lambda card: card.memory_bytes)
    cells = []
    for layout in layouts:
        candidates = fits(model, layout, demand, card=largest, engine=engine)
        if not candidates:
            continue
        chosen = least(candidates) or candidates[-1]
        cells += [
            Cell(
                layout=layout.name,
                context=context,
                tensor_parallel_size=chosen.tensor_parallel_size,
                weights=chosen.weights.total,
                cache=context * demand.concurrency * chosen.token_bytes,
                rest=chosen.activations + chosen.graphs + chosen.other,
            )
            for context in CONTEXTS
            if context <= model.max_position_embeddings
        ]
    return cells
