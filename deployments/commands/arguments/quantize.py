"""What ``dibit quantize`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

EXAMPLES = """[bold]Examples[/bold]

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
{"part": "experts", "format": "wint2", "row_order": "plain", "first_layer": 3, "last_layer": 53}]}"""


def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a bf16 model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    method: Annotated[Literal["ccq", "bpdq", "gptq", "rtn"], typer.Option(help="Encoder; see below.")] = "ccq",
    bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="Bits a weight, scales not counted; 2 by default.", show_default=False),
    ] = None,
    group_size: Annotated[int, typer.Option(metavar="N", help="Inputs that share scales (bpdq, gptq).")] = 64,
    nested: Annotated[bool, typer.Option("--nested", help="bpdq: 4 planes, readable as 2, 3 or 4.")] = False,
    dense: Annotated[
        Literal["wint8", "wint4", "bf16"], typer.Option(help="Format of all that is not a routed expert.")
    ] = "wint8",
    wint4_layers: Annotated[
        int, typer.Option(metavar="N", min=0, help="First MoE layers, whose experts get 4 bits.")
    ] = 1,
    row_order: Annotated[
        Literal["plain", "permuted"], typer.Option(help="ccq: rows for FastDeploy 2.0 (plain), or 2.1 and later.")
    ] = "plain",
    codebook: Annotated[
        Literal["tensor", "column"], typer.Option(help="ccq: one codebook a matrix, which kernels like, or a column.")
    ] = "tensor",
    effort: Annotated[Literal["fast", "default", "best"], typer.Option(help="How hard to search.")] = "default",
    quantization_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan file: a format for each part of each layer.", show_default=False),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text, or .jsonl with a field 'text'; may be repeated. Python's standard library otherwise.",
            show_default=False,
        ),
    ] = None,
    calibration_exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Pattern of files to leave out, such as those of an evaluation.", show_default=False
        ),
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Take no text: every input of a matrix counts alike.")
    ] = False,
    num_samples: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences of calibration text.")] = 128,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens in each; 2048 by default.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the choice among the calibration text.")] = 0,
    shared_inputs: Annotated[
        bool,
        typer.Option("--shared-inputs", help="Fit experts' first projections to all tokens, not to each one's own."),
    ] = False,
    weight_equally: Annotated[
        bool,
        typer.Option("--weight-equally", help="Tokens of an expert count alike, not by their routing weights."),
    ] = False,
    match_weights: Annotated[
        bool,
        typer.Option("--match-weights", help="Fit to the original's weights, not to what it puts out at each place."),
    ] = False,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Write the model in a random basis of its residual stream.")
    ] = False,
    trusted_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="An expert with fewer tokens leans on the layer's others; by default as many as its inputs.",
            show_default=False,
        ),
    ] = None,
    activations: Annotated[
        Literal["auto", "memory", "disk"], typer.Option(help="Where the tokens wait between layers.")
    ] = "auto",
    batch_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens that go through a layer at once.")
    ] = 8192,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    num_threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads.", show_default=False)
    ] = None,
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
        per_expert_inputs=not shared_inputs,
        weight_by_routing=not weight_equally,
        match_original=not match_weights,
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
