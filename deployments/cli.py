"""The ``dibit`` command. Only argument parsing lives here, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="dibit",
    help="Serve 2-bit mixture-of-experts models: over HTTP, in a chat, or offline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

SERVE_EXAMPLES = """[bold]Examples[/bold]

dibit serve

dibit serve serve_config.yaml --port 9000

dibit serve --model ~/models/ERNIE-4.5-21B-A3B-PT --tensor-parallel-size 2"""

CHAT_EXAMPLES = """[bold]Examples[/bold]

dibit chat

dibit chat "What is a dibit?"

dibit chat --url http://gpu-box:8000 --system "Answer in one sentence." --temperature 0.3"""

GENERATE_EXAMPLES = """[bold]Examples[/bold]

dibit generate --prompt "Once upon a time" --max-tokens 50

cat story.txt | dibit generate --temperature 0 --json

dibit generate -p "One" -p "Two" --seed 7"""


@app.command(epilog=SERVE_EXAMPLES)
def serve(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="Configuration; without it serve_config.yaml of this folder, else the one that comes with Dibit.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder.", show_default=False)] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name clients ask for.", show_default=False)] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.", show_default=False)
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share one copy of the model.", show_default=False)
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Copies of the model.", show_default=False)] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt and answer, in tokens.", show_default=False)
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Requests computed at once.", show_default=False)
    ] = None,
    address: Annotated[
        str, typer.Option(help="Ray cluster to deploy to; 'local' starts one that ends with this command.")
    ] = "local",
    verbose: Annotated[bool, typer.Option(help="Show the logs of Ray and of the replicas.")] = False,
) -> None:
    """Serve a model over HTTP with OpenAI's API. Options given here override the configuration file."""
    from deployments.commands.serve import ServeOverrides, run_serve

    overrides = ServeOverrides(
        model=model,
        served_model_name=served_model_name,
        host=host,
        port=port,
        tensor_parallel_size=tensor_parallel_size,
        replicas=replicas,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
    )
    run_serve(config, overrides, address=address, verbose=verbose)


@app.command(epilog=CHAT_EXAMPLES)
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


@app.command(epilog=GENERATE_EXAMPLES)
def generate(
    model: Annotated[str, typer.Option(help="Model folder.")] = "examples/ernie-tiny/bf16",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", help="Text to continue; may be repeated. Standard input otherwise.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal texts.", show_default=False)] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that share the model.")] = 1,
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: what a user got wrong is one line on standard error and exit code 1, never a traceback.

    Args:
        arguments: of the command line, without the program's name; those of this process by default.
    """
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from engine.errors import DibitError

        if not isinstance(error, DibitError):
            raise
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
