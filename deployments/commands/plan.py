"""``dibit plan``: what fits where, how fast it could be, what to buy, and the files that start it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from deployments.emit import emit
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.planning.advice import Offer, offers
from engine.planning.cards import CARDS, Card, find_card
from engine.planning.families import FAMILIES, REPOSITORIES, find_model
from engine.planning.layouts import LAYOUTS, Layout, find_layout
from engine.planning.plan import Demand, Fit, fits, least

CONTEXTS = tuple(1024 * 2**power for power in range(8))
"""1K to 128K, for ``--table`` and the plot."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of ``dibit plan``; ``layout`` None is "stored" for a checkpoint, and "wint2" or "bpdq" for a name."""

    model: str
    layout: str | None = None
    planes: Literal[2, 3, 4] = 2
    group_size: int = 256
    vocabulary: str | None = None
    kv_dtype: Literal["bf16", "int8"] = "bf16"
    context: int = 32768
    concurrency: int = 1
    gpus: Sequence[str] = ()
    utilization: float = 0.9
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enforce_eager: bool = False
    table: bool = False
    as_json: bool = False
    plot: Path | None = None
    emit: Literal["serve-config", "helm-values"] | None = None
    weights: str | None = None


def run_plan(options: PlanOptions) -> None:
    """Print the plan, or what else was asked for.

    Raises:
        ConfigError: an option is wrong; the message says what would do.
        DibitError: the model isn't there, or is not supported.
    """
    model = find_model(options.model)
    built_in = options.model.lower() in FAMILIES
    layout = _layout(options, model, options.layout or _usual(model, built_in=built_in))
    engine = EngineConfig(
        model="",
        gpu_memory_utilization=options.utilization,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enforce_eager=options.enforce_eager,
    )
    if options.context > model.max_position_embeddings:
        raise ConfigError(f"context: {options.context} exceeds the model's {model.max_position_embeddings}")
    demand = Demand(options.context, options.concurrency, options.kv_dtype)
    cards = [find_card(gpu) for gpu in options.gpus] or list(CARDS.values())
    found = offers(model, layout, demand, cards=cards, engine=engine)
    if options.emit:
        if not found:
            raise ConfigError(_nothing(layout, demand, cards))
        weights = options.weights or (None if built_in else options.model)
        weights = weights or REPOSITORIES.get((options.model.lower(), layout.name))
        if weights is None:
            raise ConfigError(f"no {layout.name} weights of {options.model} are published; name yours with --weights")
        sys.stdout.write(
            emit(
                options.emit,
                found[0],
                model=weights,
                engine=engine,
                command=_command(options),
                vocabulary=layout.vocabulary.name,
            )
        )
        return
    rows = {card.name: fits(model, layout, demand, card=card, engine=engine) for card in cards}
    grid = _grid(options, model, engine, cards) if options.table or options.plot else []
    if options.plot:
        from deployments.commands.memory_plot import plot

        plot(grid, cards, options.plot, title=f"{options.model}, {options.concurrency} at once, {options.kv_dtype} KV")
    if options.as_json:
        sys.stdout.write(json.dumps(_record(options, layout, rows, found, grid), indent=2) + "\n")
        return
    console = Console()
    if options.table:
        _show_grid(console, options, grid)
    else:
        _show(console, options, layout, rows)
        _recommend(console, layout, demand, cards, found)


def _usual(model: ModelConfig, *, built_in: bool) -> str:
    if not built_in:
        return "stored"
    return "wint2" if model.moe else "bpdq"


def _layout(options: PlanOptions, model: ModelConfig, name: str) -> Layout:
    return find_layout(name, model, planes=options.planes, group_size=options.group_size, vocabulary=options.vocabulary)


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid: bytes of one card, at the tensor-parallel size that the row is about."""

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


def _grid(options: PlanOptions, model: ModelConfig, engine: EngineConfig, cards: list[Card]) -> list[Cell]:
    """Formats by contexts: of each format all contexts at the least size that holds one sequence of any."""
    cells = []
    names = [options.layout] if options.layout else [name for name in LAYOUTS if name != "stored"]
    for name in names:
        try:
            layout = _layout(options, model, name)
        except ConfigError:
            continue  # a format for experts, and the model has none
        demand = Demand(options.context, options.concurrency, options.kv_dtype)
        largest = max(cards, key=lambda card: card.memory_bytes)
        candidates = fits(model, layout, demand, card=largest, engine=engine)
        chosen = least(candidates) or (candidates[-1] if candidates else None)
        if chosen is None:
            continue
        for context in (context for context in CONTEXTS if context <= model.max_position_embeddings):
            cells.append(
                Cell(
                    layout=name,
                    context=context,
                    tensor_parallel_size=chosen.tensor_parallel_size,
                    weights=chosen.weights.total,
                    cache=context * options.concurrency * chosen.token_bytes,
                    rest=chosen.activations + chosen.graphs + chosen.other,
                )
            )
    return cells


def _show(console: Console, options: PlanOptions, layout: Layout, rows: dict[str, list[Fit]]) -> None:
    some = next((row[0] for row in rows.values() if row), None)
    if some is None:
        raise ConfigError(f"the model can't be cut for any tensor-parallel size in {layout.name}")
    parts = Table(title=f"{options.model} in {layout.name}: weights of one card (TP {some.tensor_parallel_size})")
    parts.add_column("part")
    parts.add_column("GB", justify="right")
    for name, size in some.weights.parts.items():
        parts.add_row(name, f"{size / 1e9:,.3f}")
    parts.add_row("all", f"{some.weights.total / 1e9:,.3f}", style="bold")
    console.print(parts)
    console.print(
        f"KV cache: {some.token_bytes:,} bytes a token ({options.kv_dtype}). Activations, estimated: "
        f"{some.activations / 1e9:.2f} GB; CUDA graphs {some.graphs / 1e9:.2f} and CUDA itself "
        f"{some.other / 1e9:.2f} GB, assumed.\n"
    )
    table = Table(title=f"{options.concurrency} at once with {options.context:,} tokens each")
    for column in ("GPU", "TP", "fits", "KV tokens", "context", "sequences", "decode <=", "alone <=", "prefill <="):
        table.add_column(column, justify="left" if column == "GPU" else "right")
    for name, row in rows.items():
        for fit in row:
            table.add_row(
                name,
                str(fit.tensor_parallel_size),
                "yes" if fit.fits else "no",
                f"{fit.kv_tokens:,}",
                f"{fit.largest_context:,}",
                f"{fit.largest_concurrency:,}",
                *(f"{rate:,.0f}" for rate in (fit.decode_limit, fit.single_limit, fit.prefill_limit)),
                style=None if fit.fits else "dim",
            )
    console.print(table)
    console.print(
        "Rates are tokens a second that the card's bandwidth and arithmetic allow at most: limits, not promises.\n"
    )


def _recommend(console: Console, layout: Layout, demand: Demand, cards: list[Card], found: list[Offer]) -> None:
    if not found:
        console.print(f"[bold red]{_nothing(layout, demand, cards)}[/]")
        return
    for number, offer in enumerate(found):
        fit = offer.fit
        start = "[bold]Recommended[/]" if number == 0 else "or"
        console.print(
            f"{start}: {offer.cards} x {fit.card.name} ({offer.engines} engine(s) of TP {fit.tensor_parallel_size}), "
            f"decode at most {fit.decode_limit * offer.engines:,.0f} tokens/s"
        )


def _nothing(layout: Layout, demand: Demand, cards: list[Card]) -> str:
    names = ", ".join(card.name for card in cards)
    return (
        f"{demand.context:,} tokens in {layout.name} with {demand.kv_dtype} KV fit no engine of {names}; try a smaller "
        "--context, --kv-dtype int8, --format tight, a higher --gpu-memory-utilization, or another --gpu"
    )


def _show_grid(console: Console, options: PlanOptions, grid: list[Cell]) -> None:
    contexts = sorted({cell.context for cell in grid})
    table = Table(title=f"{options.model}: GB of one card, {options.concurrency} at once, {options.kv_dtype} KV")
    table.add_column("format")
    table.add_column("TP", justify="right")
    for context in contexts:
        table.add_column(f"{context // 1024}K", justify="right")
    for name in dict.fromkeys(cell.layout for cell in grid):
        cells = {cell.context: cell for cell in grid if cell.layout == name}
        size = next(iter(cells.values())).tensor_parallel_size
        table.add_row(name, str(size), *(f"{cells[context].total / 1e9:,.1f}" for context in contexts))
    console.print(table)


def _record(
    options: PlanOptions, layout: Layout, rows: dict[str, list[Fit]], found: list[Offer], grid: list[Cell]
) -> dict[str, Any]:
    def of(fit: Fit) -> dict[str, Any]:
        derived = ("fits", "largest_context", "largest_concurrency")
        weights = asdict(fit.weights) | {"total": fit.weights.total}
        return asdict(fit) | {"weights": weights} | {name: getattr(fit, name) for name in derived}

    return {
        "model": options.model,
        "format": layout.name,
        "fits": [of(fit) for row in rows.values() for fit in row],
        "offers": [{"cards": offer.cards, "engines": offer.engines, "engine": of(offer.fit)} for offer in found],
        "grid": [asdict(cell) | {"total": cell.total} for cell in grid],
    }


def _command(options: PlanOptions) -> str:
    """The command line again, for the head of an emitted file."""
    plain = replace(options, as_json=False, table=False, plot=None)
    words = [f"dibit plan {plain.model}"]
    if plain.layout:
        words.append(f"--format {plain.layout}")
    words += [f"--context {plain.context}", f"--concurrency {plain.concurrency}", f"--kv-dtype {plain.kv_dtype}"]
    words += [f'--gpu "{gpu}"' for gpu in plain.gpus]
    words.append(f"--emit {plain.emit}")
    return " ".join(words)
