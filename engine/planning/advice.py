"""Which cards to buy, and how many; or what to make of those that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from engine.config import EngineConfig, ModelConfig
from engine.planning.cards import Card
from engine.planning.layouts import Layout
from engine.planning.plan import Demand, Fit, fit, fits


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

    @property
    def sequences(self) -> int:
        """Of the demand's context, that all engines hold."""
        return self.engines * self.fit.largest_concurrency

    @property
    def decode_limit(self) -> float:
        """Tokens a second of all engines."""
        return self.engines * self.fit.decode_limit

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


def arrange(
    model: ModelConfig, layout: Layout, demand: Demand, *, stock: Mapping[Card, int], engine: EngineConfig | None = None
) -> list[Offer]:
    """Engines for cards that are there: of each kind the smallest that hold its part of the sequences, or most of it.

    Smaller engines are more of them, lose less to one another's pace, and less is gone when one is. Kinds share the
    sequences by what they can hold; those that can't hold one are left out.

    Args:
        model: its shapes.
        layout: its formats.
        demand: of all engines together.
        stock: cards of each kind.
        engine: its limits of a step and its share of the memory.
    """
    possible: dict[Card, list[Offer]] = {}
    for card, count in stock.items():
        alone = fits(model, layout, replace(demand, concurrency=1), card=card, engine=engine)
        sizes = [Offer(one, count // one.tensor_parallel_size) for one in alone]
        possible[card] = [offer for offer in sizes if offer.sequences]
    most = {card: max((offer.sequences for offer in sizes), default=0) for card, sizes in possible.items()}
    found = []
    for card, sizes in possible.items():
        if not sizes:
            continue
        part = -(-demand.concurrency * most[card] // sum(most.values()))
        best = max(sizes, key=lambda offer: (min(offer.sequences, part), -offer.fit.tensor_parallel_size))
        share = replace(demand, concurrency=-(-min(part, best.sequences) // best.engines))
        loaded = fit(model, layout, share, card=card, size=best.fit.tensor_parallel_size, engine=engine)
        found.append(Offer(loaded, best.engines))
    return found
