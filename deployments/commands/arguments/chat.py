"""What ``dibit chat`` takes."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = """[bold]Examples[/bold]

dibit chat

dibit chat "What is a dibit?"

dibit chat --url http://gpu-box:8000 --system "Answer in one sentence." --temperature 0.3"""


def chat(
    question: Annotated[
        str | None, typer.Argument(help="Ask this and leave; without it, a conversation.", show_default=False)
    ] = None,
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Model to ask; the server's own by default.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instruction ahead of everything.", show_default=False)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal answers.", show_default=False)] = None,
) -> None:
    """Talk to a running server."""
    from deployments.commands.chat import ChatOptions, run_chat

    options = ChatOptions(
        url=url, model=model, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed
    )
    run_chat(question, options)
