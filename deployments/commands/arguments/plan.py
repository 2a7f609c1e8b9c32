"""What ``dibit plan`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

EXAMPLES = """[bold]Examples[/bold]

dibit plan ernie-4.5-300b-a47b

dibit plan ernie-4.5-300b-a47b --format tight --kv-dtype int8 --gpu H100 --context 16384 --gpu-memory-utilization 0.99

dibit plan qwen2.5-72b --format bpdq --bits 2 --gpu 4090 --context 4096 --kv-dtype int8 --max-num-seqs 8

dibit plan ernie-4.5-300b-a47b --concurrency 64 --emit helm-values > values.yaml

dibit plan ernie-4.5-300b-a47b --gpu 8xH20-141G --gpu 8xA100-80G --concurrency 100 --emit helm-values > values.yaml"""


def make_plan(
    model: Annotated[str, typer.Argument(help="Built-in name, model folder, or repository of the Hugging Face hub.")],
    layout: Annotated[
        str | None,
        typer.Option(
            "--format", help="stored, bf16, wint8, wint4, wint2 (Baidu's 2 bits), tight or bpdq.", show_default=False
        ),
    ] = None,
    planes: Annotated[int, typer.Option("--bits", metavar="N", min=2, max=4, help="Bit planes of bpdq.")] = 2,
    group_size: Annotated[int, typer.Option(metavar="N", help="Rows of a group of bpdq, at most.")] = 256,
    embeddings: Annotated[
        str | None,
        typer.Option(
            "--quantize-embeddings",
            help="Embedding and head: bf16, int8 or int4; int4 in tight and bpdq, else bf16.",
            show_default=False,
        ),
    ] = None,
    kv_dtype: Annotated[Literal["bf16", "int8"], typer.Option(help="Keys and values in the cache.")] = "bf16",
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of each sequence, prompt and answer; 32768, or as many as the model has.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at once, all engines together.")] = 1,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help='A GPU by name, or as "80GB, 2.0TB/s, 312TFLOPs"; with a number, "8xH20-141G", those that you have. '
            "May be repeated. All known unless given."
        ),
    ] = None,
    utilization: Annotated[
        float,
        typer.Option("--gpu-memory-utilization", metavar="N", min=0.01, max=1.0, help="Share of the memory to use."),
    ] = 0.9,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Sequences in a step of an engine; 64, or as many as --concurrency.",
            show_default=False,
        ),
    ] = None,
    max_num_batched_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in a step.")] = 2048,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    table: Annotated[bool, typer.Option("--table", help="The grid of formats and contexts, 1K to 128K.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw memory against context (.svg, .png).")] = None,
    emit: Annotated[
        Literal["serve-config", "helm-values"] | None,
        typer.Option(metavar="FILE", help="Write the file that starts the first choice: serve-config or helm-values."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Folder or repository of the weights, for --emit.", show_default=False)
    ] = None,
) -> None:
    """Say what fits on which GPUs, how fast it could be at best, and what to buy."""
    from deployments.commands.plan import PlanOptions, run_plan

    run_plan(
        PlanOptions(
            model=model,
            layout=layout,
            planes=cast("Literal[2, 3, 4]", planes),
            group_size=group_size,
            embeddings=embeddings,
            kv_dtype=kv_dtype,
            context=context,
            concurrency=concurrency,
            gpus=gpu or [],
            utilization=utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enforce_eager=enforce_eager,
            table=table,
            as_json=as_json,
            plot=plot,
            emit=emit,
            weights=weights,
        )
    )
