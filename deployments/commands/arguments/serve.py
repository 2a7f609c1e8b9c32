"""What ``dibit serve`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """[bold]Examples[/bold]

dibit serve

dibit serve serve_config.yaml --port 9000

dibit serve --model ~/models/ERNIE-4.5-21B-A3B-PT --tensor-parallel-size 2"""


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
        int | None,
        typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.", show_default=False),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ranks that share one copy of the model.", show_default=False)
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Copies of the model.", show_default=False)
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest prompt and answer, in tokens.", show_default=False)
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Requests computed at once.", show_default=False)
    ] = None,
    address: Annotated[
        str, typer.Option(help="Ray cluster to deploy to; 'local' starts one that ends with this command.")
    ] = "local",
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the logs of Ray and of the replicas.")] = False,
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
