"""A plan as tables, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.planning.advice import Offer
from engine.planning.cards import Card
from engine.planning.grid import Cell
from engine.planning.plan import Demand, Fit, least


def show_parts(console: Console, fit: Fit, *, title: str) -> None:
    """Bytes by part, of one card."""
    table = Table(title=f"{title}: weights of one card (TP {fit.tensor_parallel_size})", box=SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name, size in fit.weights.parts.items():
        table.add_row(name, f"{size / 1e9:,.3f}")
    table.add_row("all", f"{fit.weights.total / 1e9:,.3f}", style="bold")
    console.print(table)
    console.print(
        f"KV cache: {fit.token_bytes:,} bytes a token ({fit.demand.kv_dtype}). The largest step takes "
        f"{fit.activations / 1e9:.2f} GB; CUDA graphs {fit.graphs / 1e9:.2f} and CUDA itself "
        f"{fit.other / 1e9:.2f} GB, both assumed.\n"
    )


def show_cards(console: Console, rows: Mapping[str, Sequence[Fit]], demand: Demand) -> None:
    """What fits where: of one kind of card all sizes of an engine, of several the least of each that does."""
    title = f"{demand.concurrency} at once with {demand.context:,} tokens each"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("GPU", no_wrap=True)
    for column in ("TP", "fits", "cache", "context", "seqs", "decode", "alone", "prefill"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        for fit in row if len(rows) == 1 else [least(row) or row[-1]] if row else []:
            rates = (fit.decode_limit, fit.single_limit, fit.prefill_limit) if fit.fits else ()
            table.add_row(
                name,
                str(fit.tensor_parallel_size),
                "yes" if fit.fits else "no",
                _short(fit.kv_tokens, 1024),
                _short(fit.largest_context, 1024),
                f"{fit.largest_concurrency:,}",
                *(_short(rate, 1000) for rate in rates),
                style=None if fit.fits else "dim",
            )
    console.print(table)
    if len(rows) > 1:
        console.print("Each GPU at the least tensor-parallel size that does, or the largest; --gpu shows all.")
    console.print(
        "cache: tokens that it holds; context: the longest of so many sequences; seqs: the most of such "
        "a context, in a step; decode, alone (one sequence) and prefill: tokens a second that the cards' "
        "bandwidth and arithmetic allow at most: limits, not promises.\n"
    )


def show_offers(console: Console, found: Sequence[Offer]) -> None:
    """What to buy, the first choice first."""
    for number, offer in enumerate(found):
        start = "[bold]Recommended[/]" if number == 0 else "         or"
        rate = _short(offer.decode_limit, 1000)
        console.print(f"{start}: {offer}, decode at most {rate} tokens/s")


def show_stock(console: Console, found: Sequence[Offer], stock: Mapping[Card, int], demand: Demand) -> None:
    """What the cards that are there make: pools of one application."""
    left = dict(stock)
    for offer in found:
        left[offer.fit.card] -= offer.cards
        rate = _short(offer.decode_limit, 1000)
        console.print(f"{offer}, {offer.sequences:,} sequences, decode at most {rate} tokens/s")
    if any(left.values()):
        unused = ", ".join(f"{count} x {card.name}" for card, count in left.items() if count)
        console.print(f"Not used: {unused}")
    held = sum(offer.sequences for offer in found)
    style = "bold" if held >= demand.concurrency else "bold red"
    console.print(
        f"[{style}]Together {held:,} sequences of {demand.context:,} tokens; {demand.concurrency:,} wanted.[/]"
    )


def show_grid(console: Console, cells: Sequence[Cell], demand: Demand, *, title: str) -> None:
    """Formats by contexts."""
    contexts = sorted({cell.context for cell in cells})
    table = Table(title=f"{title}: GB of one card, {demand.concurrency} at once, {demand.kv_dtype} KV", box=SIMPLE_HEAD)
    table.add_column("format", no_wrap=True)
    table.add_column("TP", justify="right", no_wrap=True)
    for context in contexts:
        table.add_column(f"{context // 1024}K", justify="right", no_wrap=True)
    for name in dict.fromkeys(cell.layout for cell in cells):
        row = {cell.context: cell for cell in cells if cell.layout == name}
        size = next(iter(row.values())).tensor_parallel_size
        table.add_row(name, str(size), *(f"{row[context].total / 1e9:,.1f}" for context in contexts))
    console.print(table)


def _short(count: float, unit: int) -> str:
    """In units of 1,000 for rates, and of 1,024 for tokens, as contexts are counted: 131,072 are 128K."""
    if count < 100 * unit:
        return f"{count:,.0f}"
    return f"{count / unit:,.0f}K" if count < unit**2 else f"{count / unit**2:,.2f}M"
