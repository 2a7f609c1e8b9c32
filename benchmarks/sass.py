"""Compiles every Triton kernel for sm_80 and sm_90, without a GPU, and counts what its inner loop issues a byte.

``python -m benchmarks.sass [--only PART ...] [--capability 80] [--json]``. A byte of packed weights that costs more
lane-operations than the budget of a GPU is limited by arithmetic there, not by memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import triton
from rich.console import Console
from rich.table import Table

from benchmarks.compiled import GPUS, Compiled, compile_variant
from benchmarks.disassembly import CLASSES
from benchmarks.report import context, write
from kernels import gpu
from kernels.gpu.variant import Variant

CAPABILITIES = (80, 90)


def all_variants() -> list[Variant]:
    """What the modules of `kernels.gpu` offer by a function ``variants()``, in the order of their names."""
    found: list[Variant] = []
    for module in sorted(pkgutil.iter_modules(gpu.__path__), key=lambda module: module.name):
        offers = getattr(importlib.import_module(f"kernels.gpu.{module.name}"), "variants", None)
        found += offers() if offers is not None else ()
    names = [variant.name for variant in found]
    if len(set(names)) != len(names):
        raise RuntimeError(f"two variants have one name: {sorted(name for name in names if names.count(name) > 1)}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="PART", help="variants whose name contains one of these")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append", help="default: both")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    variants = [v for v in all_variants() if not options.only or any(part in v.name for part in options.only)]
    if not variants:
        sys.exit(f"no variant's name contains any of {', '.join(options.only or [])}")
    compiled = []
    for capability in options.capability or CAPABILITIES:
        for variant in variants:
            if capability in variant.capabilities:
                compiled.append(compile_variant(variant, capability))
    result = context(["triton", "torch"]) | {
        "budgets": {name: round(gpu.budget, 2) for name, gpu in GPUS.items()},
        "kernels": [_record(one) for one in compiled],
    }
    if options.write:
        print(write("sass", result), file=sys.stderr)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _show(compiled)


def _record(compiled: Compiled) -> dict[str, Any]:
    record = dataclasses.asdict(compiled)
    record["loop"]["total"] = compiled.loop.total
    return record


def _show(compiled: Sequence[Compiled]) -> None:
    table = Table(title="Instructions of the inner loop; spilled and shared in bytes")
    table.add_column("kernel", no_wrap=True)
    for head in ("sm", "registers", "spilled", "shared", *CLASSES, "total", "loaded/warp", "ops/byte", "within"):
        table.add_column(head, justify="right")
    for one in compiled:
        per_byte = one.instructions_per_byte
        fits = [
            name for name, gpu in GPUS.items() if gpu.capability == one.capability and gpu.budget >= (per_byte or 0)
        ]
        table.add_row(
            one.name,
            *map(str, (one.capability, one.registers, one.spilled_bytes, one.shared_bytes)),
            *(str(one.loop.instructions[group] or "") for group in CLASSES),
            f"{one.loop.total}{'' if one.loop.is_loop else ' (no loop)'}",
            str(one.loop.loaded_bytes),
            "" if per_byte is None else f"{per_byte:.2f}",
            "" if per_byte is None else " ".join(fits) or "none",
        )
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(table)
    budgets = ", ".join(f"{name} {gpu.budget:.1f}" for name, gpu in GPUS.items())
    console.print(f"Lane-operations a byte may cost: {budgets}")


if __name__ == "__main__":
    main()
