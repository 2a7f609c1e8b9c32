"""What ``dibit inspect`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """[bold]Examples[/bold]

dibit inspect examples/ernie-tiny/2bits

dibit inspect ~/models/ERNIE-4.5-300B-A47B-2Bits-Paddle --verify

dibit inspect ~/models/ERNIE-4.5-300B-A47B-2Bits-Paddle --row-order"""


def inspect_model(
    model: Annotated[str, typer.Argument(help="Model folder, or repository of the Hugging Face hub.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every tensor; check shapes, ranges and NaN.")] = False,
    find_row_order: Annotated[
        bool, typer.Option("--row-order", help="Find the row order of WINT2 by running a short text under both.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(help="The same model unquantized; tells the row order from one expert.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a checkpoint holds: formats by layer, bits a weight, bytes by part and by rank, row order."""
    from deployments.commands.inspect import InspectOptions, run_inspect

    run_inspect(
        InspectOptions(model=model, verify=verify, find_row_order=find_row_order, reference=reference, as_json=as_json)
    )
