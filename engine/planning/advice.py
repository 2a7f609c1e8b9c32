"""Which cards to buy, and how many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine.config import EngineConfig, ModelConfig
from engine.planning.cards import Card
from engine.planning.layouts import Layout
from engine.planning.plan import Demand, Fit, fits


@dataclass(frozen=True, slots=True)
class Offer:
    """Engines of one kind of card that hold a demand together.

    Attributes:
        fit: one engine, with its share of the sequences.
        engines: how many.
    """

    fit: Fit
    engines: int

    @property
    def cards(self) -> int:
        """Of all engines."""
        return self.engines * self.fit.tensor_parallel_size

    def __str__(self) -> str:
        """As people say it: "8 x A100-80G: 2 engines of TP 4"."""
        engines = "1 engine" if self.engines == 1 else f"{self.engines} engines"
        return f"{self.cards} x {self.fit.card.name}: {engines} of TP {self.fit.tensor_parallel_size}"


def offers(
    model: ModelConfig, layout: Layout, demand: Demand, *, cards: Iterable[Card], engine: EngineConfig | None = None
) -> list[Offer]:
    """For each card that can do it the fewest that hold the demand; the fewest first, then by the least decode time.

    An engine of more cards has more room for the cache than as many small ones, as its weights are there only once;
    where both need equally many cards, smaller engines win, since each loses less to the others' pace.
    """
    found = []
    for card in cards:
        choices = []
        for one in fits(model, layout, replace(demand, concurrency=1), card=card, engine=engine):
            if one.largest_concurrency:
                engines = -(-demand.concurrency // one.largest_concurrency)
                choices.append((engines * one.tensor_parallel_size, one.tensor_parallel_size, engines))
        if choices:
            _, size, engines = min(choices)
            share = replace(demand, concurrency=-(-demand.concurrency // engines))
            (chosen,) = [
                other
                for other in fits(model, layout, share, card=card, engine=engine)
                if other.tensor_parallel_size == size
            ]
            found.append(Offer(chosen, engines))
    return sorted(found, key=lambda offer: (offer.cards, -offer.fit.decode_limit))
