"""What ``dibit generate`` takes."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = """[bold]Examples[/bold]

dibit generate --prompt "Once upon a time" --max-tokens 50

cat story.txt | dibit generate --temperature 0 --json

dibit generate -p "One" -p "Two" --seed 7"""


def generate(
    model: Annotated[str, typer.Option(metavar="FOLDER", help="Model folder.")] = "examples/ernie-tiny/bf16",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text to continue; may be repeated. Standard input otherwise.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="N", min=0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="N", help="Sample from the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Equal seeds give equal texts.", show_default=False)
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(metavar="N", min=1, help="Ranks that share the model.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt and line.")] = False,
) -> None:
    """Continue prompts offline, without a server."""
    from deployments.commands.generate import GenerateOptions, run_generate

    options = GenerateOptions(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        tensor_parallel_size=tensor_parallel_size,
        as_json=as_json,
    )
    run_generate(prompt or [], options)
