"""``dibit quantize``: a bf16 model folder -> a quantized one, with a progress bar, and safe to interrupt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deployments.progress import readable_bytes
from engine.compress import calibration as texts
from engine.compress.ccq import Effort
from engine.compress.encode import EncodeOptions
from engine.compress.journal import UnfinishedRunError, work_folder
from engine.compress.observe import ObserveOptions
from engine.compress.pipeline import Calibration, Report, check_folders, quantize_folder
from engine.compress.plan import Dense, Method, Recipe, read_plan
from engine.config import ModelConfig
from engine.errors import ConfigError, DibitError
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import RowOrder
from engine.tokenizer import Tokenizer

SEQUENCE_LENGTH = 2048
SWEEPS = 3
"""Of gptq and bpdq at the best effort; more bring little."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of ``dibit quantize``; see its ``--help``."""

    model: Path
    out: Path
    method: Method = "ccq"
    bits: int | None = None
    group_size: int = 64
    nested: bool = False
    dense: Dense = "wint8"
    wint4_layers: int = 1
    row_order: RowOrder = "plain"
    codebook: Literal["tensor", "column"] = "tensor"
    effort: Effort = "default"
    quantization_config: Path | None = None
    calibration: list[Path] = field(default_factory=list)
    calibration_exclude: list[str] = field(default_factory=list)
    use_calibration: bool = True
    num_samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    per_expert_inputs: bool = True
    weight_by_routing: bool = True
    match_original: bool = True
    rotate: bool = False
    trusted_tokens: int | None = None
    activations: Literal["auto", "memory", "disk"] = "auto"
    batch_tokens: int = 8192
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = None
    resume: bool = False
    overwrite: bool = False


def run_quantize(options: QuantizeOptions, documents: Iterable[str] | None = None) -> Report:
    """Quantize, show how far it is, and say what came of it.

    Args:
        options: of the command line.
        documents: texts to calibrate with; by default those that the options name.

    Raises:
        DibitError: the model or an option is wrong, or the disk is full.
    """
    console = Console(stderr=True, highlight=False)
    device = _device(options.device)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    config = check_folders(options.model, options.out, overwrite=options.overwrite)
    plan = _plan(options, config)
    calibration = _calibration(options, config, documents, console)
    try:
        report = _quantize(options, plan, calibration, device, console)
    except UnfinishedRunError:
        raise
    except (KeyboardInterrupt, DibitError):
        if (options.out.exists() and not options.overwrite) or not work_folder(options.out).exists():
            raise
        console.print(
            f"The layers done so far are kept in {work_folder(options.out)}. The same command with --resume goes on "
            "from there, with --overwrite it starts anew."
        )
        raise
    for warning in report.warnings:
        console.print(f"Warning: {warning}", style="yellow")
    console.print(summary(report, calibrated=calibration is not None))
    for folder in (options.model, options.out):
        size = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
        console.print(f"{folder}: {readable_bytes(size)}")
    return report


def summary(report: Report, *, calibrated: bool) -> Table:
    """What was written, by kind of matrix and format."""
    columns = ["matrices", "format", "weights", "bits a weight", "error of the weights"]
    table = Table(*columns, *(["error of the outputs"] if calibrated else []), caption="squared errors, relative")
    for group in report.groups.values():
        row = [group.group, group.format, f"{group.num_weights:,}", f"{group.bits_per_weight:.3f}"]
        row.append(f"{group.relative_error:.2e}")
        measured = f"{group.relative_output_error:.2e}" if group.output_energy else "-"
        table.add_row(*row, *([measured] if calibrated else []))
    return table


def _quantize(
    options: QuantizeOptions,
    plan: QuantizationConfig,
    calibration: Calibration | None,
    device: torch.device,
    console: Console,
) -> Report:
    columns = (TextColumn("{task.description:44}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("reading", total=None)
        return quantize_folder(
            options.model,
            options.out,
            plan=plan,
            calibration=calibration,
            encoding=EncodeOptions(
                error_feedback=options.method != "rtn",
                effort=options.effort,
                sweeps=SWEEPS if options.effort == "best" else 0,
                codebook=options.codebook,
            ),
            rotation_seed=options.seed if options.rotate else None,
            overwrite=options.overwrite,
            resume=options.resume,
            device=device,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )


def _plan(options: QuantizeOptions, config: ModelConfig) -> QuantizationConfig:
    if options.quantization_config is not None:
        return read_plan(options.quantization_config)
    bits = options.bits
    recipe = Recipe(
        method=options.method,
        bits=bits if bits is not None else 4 if options.nested else 2,
        dense=options.dense,
        wint4_layers=options.wint4_layers,
        group_size=options.group_size,
        nested=options.nested,
        row_order=options.row_order,
    )
    return recipe.plan(config)


def _calibration(
    options: QuantizeOptions, config: ModelConfig, documents: Iterable[str] | None, console: Console
) -> Calibration | None:
    if not options.use_calibration or options.method == "rtn":
        if options.calibration:
            why = "--method rtn takes none" if options.use_calibration else "--no-calibration is set"
            raise ConfigError(f"a calibration text is given, but {why}")
        return None
    if documents is None and options.calibration:
        documents = texts.read_documents(options.calibration, exclude=options.calibration_exclude)
    elif documents is None:
        documents = texts.standard_library(exclude=options.calibration_exclude)
        console.print(
            "Calibrating with the sources of Python's standard library, for want of another text. Text like that "
            "which the model will see makes a better model: --calibration FILE.",
            style="yellow",
        )
    length = options.sequence_length or min(SEQUENCE_LENGTH, config.max_position_embeddings)
    tokenizer = Tokenizer.from_folder(options.model)
    with console.status("Tokenizing the calibration text"):
        tokens = texts.sequences(
            documents, tokenizer, num_samples=options.num_samples, sequence_length=length, seed=options.seed
        )
    if len(tokens) < options.num_samples:
        console.print(
            f"Warning: the calibration text makes {len(tokens)} sequences of {length} tokens, not the "
            f"{options.num_samples} asked for",
            style="yellow",
        )
    return Calibration(
        tokens,
        ObserveOptions(
            per_expert_inputs=options.per_expert_inputs,
            weight_by_routing=options.weight_by_routing,
            match_original=options.match_original,
        ),
        trusted_tokens=options.trusted_tokens,
        activations=options.activations,
        batch_tokens=options.batch_tokens,
    )


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device cuda, but torch sees no GPU; use --device cpu")
    return torch.device("cuda", 0) if available and name != "cpu" else torch.device("cpu")
