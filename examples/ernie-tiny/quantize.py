"""Quantize ernie-tiny as Baidu quantized the 300B: bf16/ -> 2bits/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout without installing it

from engine.compress.pipeline import Report, quantize_folder, two_bit_plan
from engine.config import ModelConfig
from engine.errors import DibitError

HERE = Path(__file__).resolve().parent
EXPLANATION = """\
The result has the tensors, names and quantization_config of baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle:

  attention, dense MLP        WINT8  8-bit integers, one scale an output feature
  experts of the first layer  WINT4  4-bit integers, one scale an output feature
  experts of the others       WINT2  CCQ: one byte for four weights, 4-bit scales of 64 rows
  embedding, head, norms      bf16
  router                      fp32

There is no calibration data: every scale and byte is chosen for the least error of the weights themselves.
--wint4-layers 2 gives the experts of the second MoE layer 4 bits too.
"""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXPLANATION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=HERE / "bf16", help="bf16 model folder (default: %(default)s)")
    parser.add_argument("--target", type=Path, default=HERE / "2bits", help="folder to write (default: %(default)s)")
    parser.add_argument("--wint4-layers", type=int, default=1, help="MoE layers kept in WINT4 (default: %(default)s)")
    parser.add_argument(
        "--row-order",
        choices=("plain", "permuted"),
        default="plain",
        help="order of rows in a WINT2 group: plain (FastDeploy 2.0) or permuted (2.1 and later; default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target folder if it is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: more threads would only wait for each other
    console = Console()
    try:
        config = ModelConfig.from_folder(arguments.source)
        plan = two_bit_plan(config, wint4_layers=arguments.wint4_layers, row_order=arguments.row_order)
        columns = (TextColumn("{task.description:44}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("reading")
            report = quantize_folder(
                arguments.source,
                arguments.target,
                plan=plan,
                overwrite=arguments.overwrite,
                progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
    except DibitError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        return 1
    console.print(summary(report))
    for folder in (arguments.source, arguments.target):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        console.print(f"{folder}: {size / 1e6:.2f} MB")
    return 0


def summary(report: Report) -> Table:
    """What was written, by group and format."""
    table = Table("group", "format", "weights", "bits a weight", "relative squared error")
    for group in report.groups.values():
        table.add_row(
            group.group,
            group.format,
            f"{group.num_weights:,}",
            f"{group.bits_per_weight:.3f}",
            f"{group.relative_error:.2e}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
