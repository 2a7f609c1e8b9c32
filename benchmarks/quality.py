"""Quality of every way to quantize the experts of ``examples/ernie-tiny``, against bits a weight.

Everything but the routed experts stays as it is. All methods get the same calibration text, from files the model was
trained on, and are compared on files that neither training nor calibration saw: KL(original || quantized) in nats a
token, agreement on the likeliest token, and perplexity, all teacher-forced in the engine. The result is a file in
``benchmarks/results``.

    python -m benchmarks.quality
    python -m benchmarks.quality --only ccq --windows 32
    python -m benchmarks.quality --plot docs/quality.svg --from benchmarks/results/quality-….json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.ladder import CASES, Case
from benchmarks.teacher import Comparison, Teacher, compare
from engine.compress.calibration import sequences
from engine.compress.observe import ObserveOptions
from engine.compress.pipeline import Calibration, quantize_folder
from engine.config import EngineConfig
from engine.quantization.bf16 import Bf16
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import WeightFormat
from engine.tokenizer import Tokenizer

TINY = report.ROOT / "examples" / "ernie-tiny"
LARGE = ((8192, 7168), (3584, 8192))
"""(K, N) of the two matrices of an expert of ERNIE-4.5-300B-A47B."""


@dataclass(frozen=True, slots=True)
class Text:
    """Windows of tokens: [S, L] to calibrate with, [S', L'] to compare on."""

    calibration: Tensor
    evaluation: Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    name: str
    group: str
    bits_per_weight: float
    bits_per_weight_300b: float
    seconds: float
    comparison: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name or group contains one of these")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=128, help="windows to compare on (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of text (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once, one thread each (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw quality against bits into this SVG file")
    parser.add_argument("--from", dest="source", type=Path, help="draw from this result, measure nothing")
    options = parser.parse_args()
    if options.source is not None:
        result = json.loads(options.source.read_text(encoding="utf-8"))
    else:
        result = run(options)
        print(report.write("quality", result))
    print(table(result))
    print(ratios(result))
    if options.plot is not None:
        from benchmarks.plot import quality_against_bits

        options.plot.write_text(quality_against_bits(result), encoding="utf-8")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases."""
    context = report.context(["torch"])
    text = texts(options.samples, options.windows, options.length, options.seed)
    chosen = [case for case in CASES if not options.only or any(word in case.label for word in options.only)]
    started = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        pending = [pool.submit(measure, case, text) for case in chosen]
        results = []
        for case, future in zip(chosen, pending, strict=True):
            results += future.result()
            print(f"{time.monotonic() - started:6.0f} s  {case.label}", file=sys.stderr, flush=True)
    return {
        **context,
        "model": str(TINY.relative_to(report.ROOT) / "bf16"),
        "calibration": {"sequences": list(text.calibration.shape), "text": "training split"},
        "evaluation": {"windows": list(text.evaluation.shape), "text": "held-out split"},
        "quantized": "routed experts of all layers; everything else as it is",
        "results": [dataclasses.asdict(result) for result in results],
    }


def texts(samples: int, windows: int, length: int, seed: int) -> Text:
    """Calibration tokens of the training split, evaluation tokens of the held-out one."""
    sys.path.insert(0, str(TINY))
    import corpus

    tokenizer = Tokenizer.from_folder(TINY / "bf16")
    training = [source.text for source in corpus.sources(held_out=False)]
    held_out = [source.text for source in corpus.sources(held_out=True)]
    return Text(
        calibration=sequences(training, tokenizer, num_samples=samples, sequence_length=length, seed=seed),
        evaluation=sequences(held_out, tokenizer, num_samples=windows, sequence_length=length, seed=seed),
    )


def measure(case: Case, text: Text) -> list[Result]:
    """Quantize and compare; several results for a format that can be read in several ways."""
    torch.set_num_threads(1)
    source = TINY / "bf16"
    length = text.evaluation.shape[1]
    original = Teacher(engine_config(source, length))
    with tempfile.TemporaryDirectory(prefix="dibit-quality-") as folder:
        target = Path(folder) / "quantized"
        plan = QuantizationConfig.of(dense=Bf16(), experts=case.format)
        observe = ObserveOptions(
            per_expert_inputs=case.per_expert,
            weight_by_routing=case.weighted,
            match_original=case.matched,
            absorb_drift=case.absorbing,
        )
        calibration = Calibration(text.calibration, observe) if case.calibrated else None
        started = time.monotonic()
        written = quantize_folder(
            source,
            target,
            plan=plan,
            calibration=calibration,
            encoding=case.encoding,
            rotation_seed=0 if case.rotated else None,
        )
        seconds = time.monotonic() - started
        bits = written.groups["routed experts", case.format.name].bits_per_weight
        results = []
        for planes in case.read_planes or (None,):
            quantized = Teacher(engine_config(target, length, planes))
            comparison = compare(original, quantized, text.evaluation)
            quantized.close()
            results.append(
                Result(
                    name=case.name if planes is None else f"{case.name}, {planes} planes read",
                    group=case.group,
                    bits_per_weight=round(bits, 4),
                    bits_per_weight_300b=round(large_bits(case.format), 4),
                    seconds=round(seconds, 1),
                    comparison=rounded(comparison),
                )
            )
    original.close()
    return results


def engine_config(folder: Path, length: int, planes: int | None = None) -> EngineConfig:
    """One window at a time, on one thread."""
    return EngineConfig.model_validate(
        {
            "model": str(folder),
            "device": "cpu",
            "max_model_len": length,
            "max_num_seqs": 1,
            "max_num_batched_tokens": length,
            "block_size": length,
            "num_kv_blocks": 1,
            "num_threads": 1,
            "planes": planes,
        }
    )


def large_bits(weight_format: WeightFormat) -> float:
    """Bits a weight, all scales counted, that the format takes for the experts of the 300B."""
    sizes = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "I32": 4, "F32": 4}
    stored = 0
    for k, n in LARGE:
        for spec in weight_format.tensors(k, n).values():
            stored += torch.Size(spec.shape).numel() * sizes[spec.dtypes[0]]
    return 8 * stored / sum(k * n for k, n in LARGE)


def rounded(comparison: Comparison) -> dict[str, Any]:
    """For the file."""
    values = dataclasses.asdict(comparison)
    windows = values.pop("windows")
    return {name: round(value, 5) for name, value in values.items()} | {"windows": [round(kl, 5) for kl in windows]}


def table(result: dict[str, Any]) -> str:
    """For people, in Markdown."""
    lines = ["| method | bits a weight here | at the 300B's widths | KL, nats | top-1 | perplexity | s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["results"]:
        found = row["comparison"]
        lines.append(
            f"| {row['name']} | {row['bits_per_weight']:.2f} | {row['bits_per_weight_300b']:.3f} "
            f"| {found['divergence']:.4f} ± {found['divergence_error']:.4f} | {found['agreement']:.1%} "
            f"| {found['perplexity']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


PAIRS = (
    ("CCQ default: + drift absorbed", "GPTQ-2 g64, clipped"),
    ("CCQ best: more beams and sweeps", "GPTQ-2 g64, clipped"),
    ("CCQ default, a codebook for each column", "GPTQ-2 g64, clipped"),
    ("CCQ default: + drift absorbed", "BPDQ k=2 g128"),
    ("CCQ default: + drift absorbed", "BPDQ k=2 g64"),
    ("+ 2 sweeps of descent (default)", "GPTQ-2 g64, clipped, classic calibration"),
    ("+ 2 sweeps of descent (default)", "BPDQ k=2 g128, classic calibration"),
    ("CCQ default: + drift absorbed", "GPTQ-2 g64, clipped, classic calibration"),
    ("CCQ default, residual stream rotated", "CCQ default: + drift absorbed"),
)
"""Rows whose divergences are set against each other."""
_RESAMPLES = 2000


def ratios(result: dict[str, Any]) -> str:
    """Ratios of divergences with 95 % intervals of a paired bootstrap over the windows, in Markdown."""
    windows = {row["name"]: row["comparison"]["windows"] for row in result["results"]}
    lines = ["", "| KL of | as a part of that of | ratio |", "|---|---|---|"]
    for one, other in PAIRS:
        if one not in windows or other not in windows:
            continue
        pair = torch.tensor([windows[one], windows[other]], dtype=torch.float64)  # [2, S]
        picks = torch.randint(pair.shape[1], (_RESAMPLES, pair.shape[1]), generator=torch.Generator().manual_seed(0))
        sums = pair[:, picks].sum(dim=-1)  # [2, _RESAMPLES]
        low, high = torch.quantile(sums[0] / sums[1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        ratio = float(pair[0].sum() / pair[1].sum())
        lines.append(f"| {one} | {other} | {ratio:.2f} ({low:.2f}-{high:.2f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
