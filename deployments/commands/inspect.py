"""``dibit inspect``: what a checkpoint holds, and whether it is sound."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from deployments.progress import readable_bytes
from engine import row_order
from engine.checkpoint.hub import resolve_model
from engine.checkpoint.inventory import TITLES, Inventory, take_inventory, verify
from engine.checkpoint.mtp import read_mtp
from engine.config import ModelConfig
from engine.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """Options of ``dibit inspect``."""

    model: str
    verify: bool = False
    find_row_order: bool = False
    reference: Path | None = None
    as_json: bool = False


def run_inspect(options: InspectOptions) -> None:
    """Print the inventory of a checkpoint; read all of it if asked to.

    Raises:
        CheckpointError: its files are damaged, or ``--verify`` found something.
        DibitError: the model is not supported, or the evidence for a row order is weak.
    """
    folder = resolve_model(options.model)
    config = ModelConfig.from_folder(folder)
    inventory = take_inventory(folder, config)
    verdict = _find_row_order(folder, config, options) if inventory.row_order == "unknown" else None
    mtp = read_mtp(folder, config)
    problems = _verify(folder, config) if options.verify else None
    if options.as_json:
        record = _record(inventory) | {
            "row_order_evidence": verdict and dataclasses.asdict(verdict),
            "multi_token_prediction": mtp is not None,
            "problems": problems,
        }
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        _show(inventory, config, verdict, has_mtp=mtp is not None)
    if problems:
        shown = "\n  ".join(problems[:20])
        raise CheckpointError(f"{folder}: {len(problems)} problems\n  {shown}")
    if problems is not None and not options.as_json:
        Console().print("Every tensor was read: shapes, dtypes and values are sound.")


def _find_row_order(folder: Path, config: ModelConfig, options: InspectOptions) -> row_order.Verdict | None:
    if options.reference is not None:
        return row_order.by_expert(folder, config, options.reference)
    if not options.find_row_order:
        return None
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    with Console(stderr=True).status("Running a short text through the model under both row orders"):
        return row_order.by_text(folder, config, device=torch.device(device), dtype=dtype)


def _verify(folder: Path, config: ModelConfig) -> list[str]:
    columns = (TextColumn("{task.description:40}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=None)
        return list(
            verify(
                folder,
                config,
                lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
        )


def _show(inventory: Inventory, config: ModelConfig, verdict: row_order.Verdict | None, *, has_mtp: bool) -> None:
    console = Console(highlight=False)
    experts = f", {config.moe.num_experts} experts, {config.moe.num_experts_per_token} a token" if config.moe else ""
    console.print(
        f"{inventory.folder}: {config.architecture}, {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}{experts}; {inventory.naming} names, {readable_bytes(inventory.num_bytes)}",
        soft_wrap=True,
    )
    formats = Table("matrices", "layers", "format", "weights", "bits a weight", "bytes", title="Formats")
    for use in inventory.formats:
        layers = str(use.first) if use.first == use.last else f"{use.first}-{use.last}"
        bits, size = f"{use.bits_per_weight:.4f}", readable_bytes(use.num_bytes)
        formats.add_row(TITLES[use.part], layers, use.format, f"{use.num_weights:,}", bits, size)
    console.print(formats)
    parts = Table("part", "bytes", "share", title="Bytes")
    for part, num_bytes in inventory.bytes_by_part.items():
        parts.add_row(TITLES[part], readable_bytes(num_bytes), f"{num_bytes / inventory.num_bytes:.1%}")
    console.print(parts)
    if len(inventory.bytes_by_rank) > 1:
        ranks = ", ".join(readable_bytes(size) for size in inventory.bytes_by_rank)
        console.print(f"Cut for {len(inventory.bytes_by_rank)} ranks ({ranks}); loads at any tensor-parallel size.")
    if inventory.row_order is not None:
        console.print(f"WINT2 row order: {_row_order(inventory, verdict)}", soft_wrap=True)
    console.print(f"Multi-token prediction: {'present, not used for decoding' if has_mtp else 'none'}")


def _row_order(inventory: Inventory, verdict: row_order.Verdict | None) -> str:
    if inventory.row_order != "unknown":
        return f"{inventory.row_order} (config.json says so)"
    if verdict is None:
        return "not said by the files; --row-order finds out by a text, --reference FOLDER by an unquantized copy"
    return f"{verdict.row_order or 'not clear'}: {verdict.explanation}"


def _record(inventory: Inventory) -> dict[str, Any]:
    record = dataclasses.asdict(inventory)
    record["folder"] = str(inventory.folder)
    for use, raw in zip(inventory.formats, record["formats"], strict=True):
        raw["bits_per_weight"] = round(use.bits_per_weight, 4)
    return record
