"""``dibit plan``: what fits where, how fast it could be, what to buy, and the files that start it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from deployments.commands.plan_tables import show_cards, show_grid, show_offers, show_parts, show_stock
from deployments.emit import emit
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.planning.advice import Offer, arrange, offers
from engine.planning.cards import CARDS, Card, find_stock
from engine.planning.families import FAMILIES, REPOSITORIES, find_model
from engine.planning.grid import Cell, grid
from engine.planning.layouts import LAYOUTS, Layout, find_layout
from engine.planning.plan import Demand, Fit, fits

MOST_SEQS = 256
USUAL_CONTEXT = 32768
GROUP_SIZES = range(32, 257, 32)
"""Rows of a group that bit planes may have."""
DEFAULTS = EngineConfig(model="")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of ``dibit plan``.

    ``layout`` None is "stored" for a checkpoint, and "wint2" or "bpdq" for a name; ``context`` None is `USUAL_CONTEXT`,
    or as long as the model's; ``max_num_seqs`` None is the engine's default, or as many sequences as there are, up to
    `MOST_SEQS`.
    """

    model: str
    layout: str | None = None
    planes: Literal[2, 3, 4] = 2
    group_size: int = 256
    embeddings: str | None = None
    kv_dtype: Literal["bf16", "int8"] = "bf16"
    context: int | None = None
    concurrency: int = 1
    gpus: Sequence[str] = ()
    utilization: float = 0.9
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    enforce_eager: bool = False
    table: bool = False
    as_json: bool = False
    plot: Path | None = None
    emit: Literal["serve-config", "helm-values"] | None = None
    weights: str | None = None


ROUNDED: dict[str, Literal["wint8", "wint4"]] = {"wint8": "wint8", "wint4": "wint4"}
"""Layouts that an engine makes of unquantized weights as it loads them, and its option for that."""
FLAGS = {
    "layout": "--format",
    "planes": "--bits",
    "group_size": "--group-size",
    "embeddings": "--quantize-embeddings",
    "kv_dtype": "--kv-dtype",
    "context": "--context",
    "concurrency": "--concurrency",
    "utilization": "--gpu-memory-utilization",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "enforce_eager": "--enforce-eager",
    "weights": "--weights",
    "emit": "--emit",
}
"""Options that an emitted file depends on, as they are typed."""


def run_plan(options: PlanOptions) -> None:
    """Print the plan, or what else was asked for.

    Raises:
        ConfigError: an option is wrong; the message says what would do.
        DibitError: the model isn't there, or is not supported.
    """
    if options.group_size not in GROUP_SIZES:
        raise ConfigError(f"--group-size: {options.group_size} is no multiple of 32 from 32 to 256")
    model = find_model(options.model)
    built_in = options.model.lower() in FAMILIES
    layout = _layout(options, model, options.layout or _usual(model, built_in=built_in))
    engine = EngineConfig(
        model="",
        gpu_memory_utilization=options.utilization,
        max_num_seqs=options.max_num_seqs or max(DEFAULTS.max_num_seqs, min(options.concurrency, MOST_SEQS)),
        max_num_batched_tokens=options.max_num_batched_tokens,
        enforce_eager=options.enforce_eager,
    )
    context = options.context or min(USUAL_CONTEXT, model.max_position_embeddings)
    if context > model.max_position_embeddings:
        raise ConfigError(f"context: {context} exceeds the model's {model.max_position_embeddings}")
    demand = Demand(context, options.concurrency, options.kv_dtype)
    stock = _stock(options.gpus)
    cards = list(stock or CARDS.values())
    owned = {card: count for card, count in stock.items() if count is not None}
    if owned:
        found = arrange(model, layout, demand, stock=owned, engine=engine)
    else:
        found = offers(model, layout, demand, cards=cards, engine=engine)
    if options.emit:
        if not found:
            raise ConfigError(_nothing(layout, demand, cards))
        weights, on_load = _weights(options, layout, built_in=built_in)
        sys.stdout.write(
            emit(
                options.emit,
                found if owned else found[:1],
                model=weights,
                engine=engine.model_copy(update={"quantization": on_load}),
                command=_command(options),
                embeddings=layout.embeddings,
            )
        )
        return
    rows = {card.name: fits(model, layout, demand, card=card, engine=engine) for card in cards}
    cells = grid(model, _layouts(options, model), demand, cards, engine) if options.table or options.plot else []
    if options.plot:
        from deployments.commands.memory_plot import plot

        plot(cells, cards, options.plot, title=f"{options.model}, {options.concurrency} at once, {options.kv_dtype} KV")
    if options.as_json:
        sys.stdout.write(json.dumps(_record(options, layout, rows, found, cells), indent=2) + "\n")
        return
    console = Console()
    if options.table:
        show_grid(console, cells, demand, title=options.model)
        return
    if not any(rows.values()):
        raise ConfigError(f"the model can't be cut for any tensor-parallel size in {layout.name}")
    show_parts(console, next(row[0] for row in rows.values() if row), title=f"{options.model} in {layout.name}")
    show_cards(console, rows, demand)
    if found:
        show_stock(console, found, owned, demand) if owned else show_offers(console, found)
    else:
        console.print(f"[bold red]{_nothing(layout, demand, cards)}[/]")


def _stock(gpus: Sequence[str]) -> dict[Card, int | None]:
    """The cards asked for, and how many there are of each, if that is said.

    Raises:
        ConfigError: one can't be understood, or numbers are missing.
    """
    found: dict[Card, int | None] = {}
    for card, count in map(find_stock, gpus):
        if card in found:
            raise ConfigError(f"gpu: {card.name} is there twice")
        found[card] = count
    if len({count is None for count in found.values()}) > 1:
        raise ConfigError('gpu: give a number with all of them ("8xH20-141G": you have these) or with none')
    return found


def _usual(model: ModelConfig, *, built_in: bool) -> str:
    if not built_in:
        return "stored"
    return "wint2" if model.moe else "bpdq"


def _weights(options: PlanOptions, layout: Layout, *, built_in: bool) -> tuple[str, Literal["wint8", "wint4"] | None]:
    """Where weights in that layout are, and how they are rounded on the way in."""
    if options.weights or not built_in:
        return options.weights or options.model, None
    name = options.model.lower()
    if (published := REPOSITORIES.get((name, layout.name))) is not None:
        return published, None
    whole = REPOSITORIES.get((name, "bf16"))
    on_load: Literal["wint8", "wint4"] | None = ROUNDED.get(layout.name)
    if whole is not None and on_load is not None:
        return whole, on_load
    raise ConfigError(f"no {layout.name} weights of {options.model} are published; name yours with --weights")


def _nothing(layout: Layout, demand: Demand, cards: list[Card]) -> str:
    names = ", ".join(card.name for card in cards)
    return (
        f"{demand.context:,} tokens in {layout.name} with {demand.kv_dtype} KV fit no engine of {names}; try a smaller "
        "--context, --kv-dtype int8, --format tight, a higher --gpu-memory-utilization, or another --gpu"
    )


def _layout(options: PlanOptions, model: ModelConfig, name: str) -> Layout:
    return find_layout(name, model, planes=options.planes, group_size=options.group_size, embeddings=options.embeddings)


def _layouts(options: PlanOptions, model: ModelConfig) -> list[Layout]:
    """The one asked for, or all that the model can have."""
    layouts = []
    for name in [options.layout] if options.layout else [name for name in LAYOUTS if name != "stored"]:
        try:
            layouts.append(_layout(options, model, name))
        except ConfigError:
            if options.layout:
                raise
    return layouts


def _record(
    options: PlanOptions, layout: Layout, rows: dict[str, list[Fit]], found: list[Offer], cells: list[Cell]
) -> dict[str, Any]:
    def of(fit: Fit) -> dict[str, Any]:
        derived = ("fits", "largest_context", "largest_concurrency")
        weights = asdict(fit.weights) | {"total": fit.weights.total}
        return asdict(fit) | {"weights": weights} | {name: getattr(fit, name) for name in derived}

    return {
        "model": options.model,
        "format": layout.name,
        "fits": [of(fit) for row in rows.values() for fit in row],
        "offers": [
            {
                "cards": offer.cards,
                "engines": offer.engines,
                "sequences": offer.sequences,
                "decode_limit": offer.decode_limit,
                "engine": of(offer.fit),
            }
            for offer in found
        ],
        "grid": [asdict(cell) | {"total": cell.total} for cell in cells],
    }


def _command(options: PlanOptions) -> str:
    """The command line again, for the head of an emitted file."""
    words = ["dibit", "plan", options.model]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in FLAGS and value != field.default:
            words += [FLAGS[field.name]] if value is True else [FLAGS[field.name], str(value)]
    for gpu in options.gpus:
        words += ["--gpu", gpu]
    return shlex.join(words)
