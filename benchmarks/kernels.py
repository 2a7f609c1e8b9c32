"""Times of every operation and weight format, as shares of what the memory of this machine gives.

``python -m benchmarks.kernels --scale 300b`` needs a GPU: CUDA graphs and events, caches flushed, formats interleaved,
median and spread. ``--device cpu --scale tiny`` runs the same code on a CPU, where its numbers mean little.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import FORMATS, Case, Cases
from benchmarks.report import context, write
from benchmarks.scales import MODELS
from benchmarks.timing import Times, copy_bandwidth, measure, pick_device

BATCHES = {"tiny": (1, 3)}
ALL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
CONTEXTS = {"tiny": (40,)}
ALL_CONTEXTS = (1024, 32768)
BASELINE = "torch dense"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=tuple(MODELS), default="300b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", metavar="PART", help="operations whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=50, help="measurements of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    if device.type == "cpu" and options.scale != "tiny":
        sys.exit("a CPU takes --scale tiny only")
    bandwidth = copy_bandwidth(device)
    result = context(["torch"]) | {
        "scale": options.scale,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "copy_bytes_per_second": round(bandwidth),
        "rounds": options.rounds,
    }
    cases = Cases(
        MODELS[options.scale],
        formats=options.formats,
        batches=options.batches or BATCHES.get(options.scale, ALL_BATCHES),
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        contexts=CONTEXTS.get(options.scale, ALL_CONTEXTS),
    )
    rows: list[dict[str, Any]] = []
    for case in cases.all(options.only or ()):
        times = measure([entry.run for entry in case.entries], device=device, rounds=options.rounds)
        rows += _rows(case, times, bandwidth)
    result["kernels"] = _with_ratios(rows)
    if options.write:
        print(write("kernels", result), file=sys.stderr)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _show(result)


def _rows(case: Case, times: Sequence[Times], bandwidth: float) -> list[dict[str, Any]]:
    return [
        {
            "operation": case.operation,
            "shape": case.shape,
            "batch": case.batch,
            "format": entry.name,
            "microseconds": {"10": _us(taken.low), "50": _us(taken.median), "90": _us(taken.high)},
            "moved_bytes": entry.moved,
            "share_of_copy_bandwidth": round(entry.moved / taken.median / bandwidth, 4),
            "captured": taken.captured,
        }
        for entry, taken in zip(case.entries, times, strict=True)
    ]


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with how many times as fast as torch's dense product of the same shape and batch it is."""
    key = ("operation", "shape", "batch")
    baselines = {tuple(r[k] for k in key): r["microseconds"]["50"] for r in rows if r["format"] == BASELINE}
    for row in rows:
        baseline = baselines.get(tuple(row[k] for k in key))
        row["times_as_fast_as_torch"] = baseline and round(baseline / row["microseconds"]["50"], 3)
    return rows


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def _show(result: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table("operation", "shape", "batch", "format", "us (10-90 %)", "MB", "of copy", "x torch")
    for row in result["kernels"]:
        low, middle, high = row["microseconds"].values()
        table.add_row(
            row["operation"],
            row["shape"],
            str(row["batch"]),
            row["format"],
            f"{middle} ({low}-{high}){'' if row['captured'] else ' *'}",
            f"{row['moved_bytes'] / 1e6:.2f}",
            f"{row['share_of_copy_bandwidth']:.1%}",
            f"{row['times_as_fast_as_torch'] or ''}",
        )
    console.print(table)
    console.print(
        f"{result['scale']} on {result['device']}, copy {result['copy_bytes_per_second'] / 1e9:,.1f} GB/s; "
        "* not a CUDA graph: with the time of launching"
    )


if __name__ == "__main__":
    main()
