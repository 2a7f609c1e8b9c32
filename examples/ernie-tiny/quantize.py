"""Quantize ernie-tiny as Baidu quantized the 300B: bf16/ -> 2bits/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import corpus
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout without installing it

from deployments.commands.quantize import QuantizeOptions, run_quantize
from engine.errors import DibitError

HERE = Path(__file__).resolve().parent
EXPLANATION = """\
The result has the tensors, names and quantization_config of baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle:

  attention, dense MLP        WINT8  8-bit integers, one scale an output feature
  experts of the first layer  WINT4  4-bit integers, one scale an output feature
  experts of the others       WINT2  CCQ: one byte for four weights, 4-bit scales of 64 rows
  embedding, head, norms      bf16
  router                      fp32

It is what "dibit quantize bf16 --out 2bits" does, with one difference: the calibration text is the example's training
split of the standard library, so that evaluate.py measures it on files that neither training nor calibration saw.
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
    parser.add_argument(
        "--effort",
        choices=("fast", "default", "best"),
        default="best",
        help="how hard to search (default: %(default)s)",
    )
    parser.add_argument("--num-samples", type=int, default=256, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    parser.add_argument("--overwrite", action="store_true", help="replace the target folder if it is there")
    arguments = parser.parse_args()
    options = QuantizeOptions(
        model=arguments.source,
        out=arguments.target,
        wint4_layers=arguments.wint4_layers,
        row_order=arguments.row_order,
        effort=arguments.effort,
        num_samples=arguments.num_samples,
        sequence_length=arguments.sequence_length,
        device="cpu",
        num_threads=1,  # the matrices are small: more threads would only wait for each other
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    try:
        run_quantize(options, [source.text for source in corpus.sources(held_out=False)])
    except DibitError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
