"""The ``dibit`` command. Only argument parsing lives here, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from deployments.commands import keys

app = typer.Typer(
    name="dibit",
    help="Serve 2-bit mixture-of-experts models: over HTTP, in a chat, or offline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app)

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

QUANTIZE_EXAMPLES = """[bold]Examples[/bold]

dibit quantize ~/models/ERNIE-4.5-21B-A3B-PT --out ~/models/ERNIE-4.5-21B-2bits --calibration texts.jsonl

dibit quantize MODEL --out OUT --method bpdq --bits 3 --group-size 128

dibit quantize MODEL --out OUT --method bpdq --nested

dibit quantize MODEL --out OUT --quantization-config plan.json

dibit quantize MODEL --out OUT --resume

[bold]Formats[/bold]

ccq is Baidu's WINT2, 2.06 bits a weight, which FastDeploy reads too. bpdq has 2, 3 or 4 bit planes with free levels;
--nested stores 4 that can be read as 2, 3 or 4. gptq has 2, 4 or 8 bits on an even grid. rtn only rounds, without any
calibration. In a model with routed experts the method is for these, and --dense for the rest; in one without, it
is for every linear.

A plan file gives each part of each layer a format:
{"quantization": "dibit", "rules": \\[{"part": "attention", "format": "wint8"}, {"part": "mlp", "format": "wint8"},
{"part": "experts", "format": "wint2", "row_order": "plain", "first_layer": 3, "last_layer": 53}, …]}"""


PLAN_EXAMPLES = """[bold]Examples[/bold]

dibit plan ernie-4.5-300b-a47b

dibit plan ernie-4.5-300b-a47b --format tight --kv-dtype int8 --gpu H100 --context 16384 --gpu-memory-utilization 0.99

dibit plan qwen2.5-72b --format bpdq --bits 2 --gpu 4090 --context 4096 --kv-dtype int8 --max-num-seqs 8

dibit plan ernie-4.5-300b-a47b --concurrency 64 --emit helm-values > values.yaml"""


INSPECT_EXAMPLES = """[bold]Examples[/bold]

dibit inspect examples/ernie-tiny/2bits

dibit inspect ~/models/ERNIE-4.5-300B-A47B-2Bits-Paddle --verify

dibit inspect ~/models/ERNIE-4.5-300B-A47B-2Bits-Paddle --row-order"""


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


@app.command(epilog=QUANTIZE_EXAMPLES)
def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a bf16 model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    method: Annotated[Literal["ccq", "bpdq", "gptq", "rtn"], typer.Option(help="Encoder; see below.")] = "ccq",
    bits: Annotated[
        int | None, typer.Option(help="Bits a weight, scales not counted; 2 by default.", show_default=False)
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share scales (bpdq, gptq).")] = 64,
    nested: Annotated[bool, typer.Option("--nested", help="bpdq: 4 planes, readable as 2, 3 or 4.")] = False,
    dense: Annotated[
        Literal["wint8", "wint4", "bf16"], typer.Option(help="Format of all that is not a routed expert.")
    ] = "wint8",
    wint4_layers: Annotated[int, typer.Option(min=0, help="First MoE layers, whose experts get 4 bits.")] = 1,
    row_order: Annotated[
        Literal["plain", "permuted"], typer.Option(help="ccq: rows for FastDeploy 2.0 (plain), or 2.1 and later.")
    ] = "plain",
    codebook: Annotated[
        Literal["tensor", "column"], typer.Option(help="ccq: one codebook a matrix, which kernels like, or a column.")
    ] = "tensor",
    effort: Annotated[Literal["fast", "default", "best"], typer.Option(help="How hard to search.")] = "default",
    quantization_config: Annotated[
        Path | None, typer.Option(help="Plan file: a format for each part of each layer.", show_default=False)
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text, or .jsonl with a field 'text'; may be repeated. Python's standard library otherwise.",
            show_default=False,
        ),
    ] = None,
    calibration_exclude: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of files to leave out, such as those of an evaluation.", show_default=False),
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Take no text: every input of a matrix counts alike.")
    ] = False,
    num_samples: Annotated[int, typer.Option(min=1, help="Sequences of calibration text.")] = 128,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each; 2048 by default.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice among the calibration text.")] = 0,
    per_expert_inputs: Annotated[
        bool,
        typer.Option(
            "--per-expert-inputs/--shared-inputs",
            help="Statistics for the first projections of experts: of each one's own tokens, or of all tokens.",
        ),
    ] = True,
    weight_by_routing: Annotated[
        bool,
        typer.Option(
            "--weight-by-routing/--weight-equally",
            help="Tokens of an expert count by their routing weights, as their errors do, or alike.",
        ),
    ] = True,
    match_original: Annotated[
        bool,
        typer.Option(
            "--match-original/--match-weights",
            help="Fit to what the original model puts out at the same place, or to its weights.",
        ),
    ] = True,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Write the model in a random basis of its residual stream.")
    ] = False,
    trusted_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="An expert with fewer tokens leans on the layer's others; by default as many as its inputs.",
            show_default=False,
        ),
    ] = None,
    activations: Annotated[
        Literal["auto", "memory", "disk"], typer.Option(help="Where the tokens wait between layers.")
    ] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens that go through a layer at once.")] = 8192,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT; throw away an unfinished run unless it is resumed.")
    ] = False,
) -> None:
    """Make a model of few bits: layer by layer, fitted to a calibration text, and safe to interrupt."""
    from deployments.commands.quantize import QuantizeOptions, run_quantize

    options = QuantizeOptions(
        model=model,
        out=out,
        method=method,
        bits=bits,
        group_size=group_size,
        nested=nested,
        dense=dense,
        wint4_layers=wint4_layers,
        row_order=row_order,
        codebook=codebook,
        effort=effort,
        quantization_config=quantization_config,
        calibration=calibration or [],
        calibration_exclude=calibration_exclude or [],
        use_calibration=not no_calibration,
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
        per_expert_inputs=per_expert_inputs,
        weight_by_routing=weight_by_routing,
        match_original=match_original,
        rotate=rotate,
        trusted_tokens=trusted_tokens,
        activations=activations,
        batch_tokens=batch_tokens,
        device=device,
        num_threads=num_threads,
        resume=resume,
        overwrite=overwrite,
    )
    run_quantize(options)


@app.command("inspect", epilog=INSPECT_EXAMPLES)
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


@app.command("env")
def show_environment(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what this machine has: versions, devices, and which kernels would run, and why."""
    from deployments.commands.env import run_env

    run_env(as_json=as_json)


@app.command("plan", epilog=PLAN_EXAMPLES)
def make_plan(
    model: Annotated[str, typer.Argument(help="Built-in name, model folder, or repository of the Hugging Face hub.")],
    layout: Annotated[
        str | None,
        typer.Option(
            "--format", help="stored, bf16, wint8, wint4, wint2 (Baidu's 2 bits), tight or bpdq.", show_default=False
        ),
    ] = None,
    planes: Annotated[int, typer.Option("--bits", min=2, max=4, help="Bit planes of bpdq.")] = 2,
    group_size: Annotated[int, typer.Option(help="Rows of a group of bpdq, at most.")] = 256,
    vocabulary: Annotated[
        str | None,
        typer.Option(help="Format of embedding and head: bf16, wint8 or wint4.", show_default=False),
    ] = None,
    kv_dtype: Annotated[Literal["bf16", "int8"], typer.Option(help="Keys and values in the cache.")] = "bf16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence, prompt and answer.")] = 32768,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences at once, all engines together.")] = 1,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help='A GPU by name, or as "80GB, 2.0TB/s, 312TFLOPs"; may be repeated. All known unless given.'),
    ] = None,
    utilization: Annotated[
        float, typer.Option("--gpu-memory-utilization", min=0.01, max=1.0, help="Share of the memory to use.")
    ] = 0.9,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a step.")] = 2048,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    table: Annotated[bool, typer.Option("--table", help="The grid of formats and contexts, 1K to 128K.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw memory against context (.svg, .png).")] = None,
    emit: Annotated[
        Literal["serve-config", "helm-values"] | None, typer.Option(help="Write the file that starts the first choice.")
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
            vocabulary=vocabulary,
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
