"""Whole decode steps of a model that need not be there: its shapes, and random packed weights made on the GPU itself.

``python -m benchmarks.full_size`` runs ERNIE-4.5-300B-A47B in one of two layouts: "wint2" (that of Baidu's 2-bit
checkpoint; 93.8 GB of weights) or "tight" (experts in 2 bits, the rest in 4, int8 cache; one card of 80 GB). What
it computes is noise, what it reads and launches is what a served model does: the engine's own model, runner and CUDA
graphs. ``dibit plan`` has the bytes by part.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.random_weights import RandomWeights
from benchmarks.report import context, percentile, write
from benchmarks.scales import LAYOUTS, MODELS
from benchmarks.timing import copy_bandwidth, pick_device
from engine.config import ModelConfig
from engine.execution import kv_cache
from engine.execution.batch import StepInput
from engine.execution.graphs import CudaCapture
from engine.execution.parallel import TensorParallelGroup
from engine.execution.runner import ModelRunner
from engine.models import build_model
from engine.planning.layouts import Layout, find_layout
from engine.planning.weights import weigh

BLOCK_SIZE = 16
BATCHES = {"300b": (1, 8, 32, 64), "21b": (1, 8, 32, 64), "tiny": (1, 2)}
CONTEXTS = {"300b": (1024, 32768), "21b": (1024, 32768), "tiny": (16, 64)}
WARM_UP = 3
ROOM_BYTES = 2 * 10**9
"""Left to activations, graphs and torch's allocator when the cache is sized."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=tuple(MODELS), default="300b")
    parser.add_argument("--layout", choices=LAYOUTS, default="wint2")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each batch and context")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--codebooks",
        choices=("one", "columns"),
        help="of a WINT2 matrix: one, as `dibit quantize` writes, or one a column, as Baidu's files may have; "
        "default: columns in wint2, one in tight",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args(arguments)
    model = MODELS[options.scale]
    chosen = find_layout(options.layout, model)
    if options.codebooks is not None:
        chosen = replace(chosen, one_codebook=options.codebooks == "one")
    device = pick_device(options.device)
    if device.type == "cpu" and options.scale != "tiny":
        sys.exit("a CPU takes --scale tiny only; `dibit plan` prints the bytes of the other models")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    result = context(["torch"]) | {"scale": options.scale, "layout": options.layout, "device": _device_name(device)}
    result |= _run(model, chosen, options, device=device, dtype=dtype)
    if options.write:
        print(write("full-size", result), file=sys.stderr)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _show(result)


def _run(
    model: ModelConfig,
    chosen: Layout,
    options: argparse.Namespace,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    bandwidth = copy_bandwidth(device)
    started = time.perf_counter()
    weights = RandomWeights(
        model,
        chosen.formats,
        device=device,
        dtype=dtype,
        one_codebook=chosen.one_codebook,
    )
    with torch.inference_mode():
        decoder = build_model(
            model,
            weights,
            TensorParallelGroup(0, 1),
            dtype=dtype,
            device=device,
            quantize_embeddings=chosen.embeddings,
        )
    kv_dtype = torch.int8 if chosen.name == "tight" else dtype
    block_bytes = kv_cache.block_bytes(model, model.num_key_value_heads, block_size=BLOCK_SIZE, dtype=kv_dtype)
    batches = options.batches or BATCHES[options.scale]
    contexts = options.contexts or CONTEXTS[options.scale]
    room = _room(device, block_bytes)
    planned = weigh(model, chosen)
    wanted = [(b, c, b * -(-c // BLOCK_SIZE)) for c in contexts for b in batches]
    fitting = [blocks for _, _, blocks in wanted if blocks < room]
    if not fitting:
        sys.exit(f"{room} blocks of {BLOCK_SIZE} tokens fit beside the weights; no batch and context asked for does")
    cache = kv_cache.allocate(
        model,
        model.num_key_value_heads,
        num_blocks=max(fitting) + 1,  # and one for the graphs
        block_size=BLOCK_SIZE,
        dtype=kv_dtype,
        device=device,
    )
    runner = ModelRunner(decoder, cache, dtype=dtype, device=device)
    if device.type == "cuda" and not options.enforce_eager:
        sizes = tuple(sorted({b for b, _, blocks in wanted if blocks < room}))
        runner.capture(CudaCapture(device), sizes, max_blocks=-(-max(contexts) // BLOCK_SIZE))
    ready = time.perf_counter() - started
    steps = []
    for batch, length, blocks in wanted:
        if blocks >= room:
            steps.append({"batch": batch, "context": length, "skipped": f"{blocks} blocks; {room} fit"})
            continue
        seconds = _decode_seconds(runner, batch, length, options.steps, vocab_size=model.vocab_size)
        median = percentile(seconds, 50)
        read = planned.read(batch, model) + batch * length * block_bytes // BLOCK_SIZE
        steps.append(
            {
                "batch": batch,
                "context": length,
                "graph": runner.graphs is not None,
                "milliseconds": {p: round(1e3 * percentile(seconds, p), 4) for p in (10, 50, 90)},
                "tokens_per_second": round(batch / median, 2),
                "read_bytes": round(read),
                "share_of_copy_bandwidth": round(read / median / bandwidth, 4),
            }
        )
    return {
        "copy_bytes_per_second": round(bandwidth),
        "seconds_to_make_the_model": round(ready, 1),
        "planned_weight_bytes": planned.total,
        "memory": _memory(device) | {"kv_cache_bytes": cache.num_blocks * block_bytes},
        "steps": steps,
    }


def decode_step(batch: int, length: int, *, seed: int, vocab_size: int) -> StepInput:
    """One token each of `batch` sequences of `length` tokens, in blocks that are theirs alone, in mixed order."""
    chance = np.random.default_rng(seed)
    width = -(-length // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(batch * width).astype(np.int32).reshape(batch, width)
    last = length - 1
    return StepInput(
        token_ids=chance.integers(0, vocab_size, batch, dtype=np.int32),
        positions=np.full(batch, last, dtype=np.int32),
        slot_mapping=tables[:, -1].astype(np.int64) * BLOCK_SIZE + last % BLOCK_SIZE,
        block_tables=tables,
        query_start=np.arange(batch + 1, dtype=np.int32),
        context_lens=np.full(batch, length, dtype=np.int32),
        logits_rows=np.arange(batch, dtype=np.int32),
    )


def _decode_seconds(runner: ModelRunner, batch: int, length: int, steps: int, *, vocab_size: int) -> list[float]:
    """Wall clock of whole steps: copying the arrays, the model, the greedy choice, and its way to the host."""
    taken = []
    for i in range(WARM_UP + steps):
        step = decode_step(batch, length, seed=i, vocab_size=vocab_size)
        started = time.perf_counter()
        logits = runner.run(step)
        if logits is None:
            raise RuntimeError("one rank has the logits")
        logits.argmax(dim=-1).tolist()
        taken.append(time.perf_counter() - started)
    return taken[WARM_UP:]


def _room(device: torch.device, block_bytes: int) -> int:
    """Blocks of cache that fit beside the weights."""
    if device.type == "cpu":
        return 4096
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - ROOM_BYTES) // block_bytes


def _memory(device: torch.device) -> dict[str, int]:
    if device.type == "cpu":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"total_bytes": total, "used_bytes": total - free, "peak_bytes": torch.cuda.max_memory_allocated(device)}


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _show(result: dict[str, Any]) -> None:
    table = Table("batch", "context", "ms a step (10-90 %)", "tokens/s", "GB read", "of copy bandwidth")
    for step in result["steps"]:
        where = str(step["batch"]), str(step["context"])
        if "skipped" in step:
            table.add_row(*where, f"does not fit: {step['skipped']}")
            continue
        low, middle, high = step["milliseconds"].values()
        share = f"{step['share_of_copy_bandwidth']:.1%}"
        table.add_row(
            *where, f"{middle} ({low}-{high})", str(step["tokens_per_second"]), f"{step['read_bytes'] / 1e9:.2f}", share
        )
    console = Console(highlight=False)
    console.print(f"{result['scale']}, {result['layout']}, on {result['device']}")
    console.print(table)
    console.print(f"copy bandwidth {result['copy_bytes_per_second'] / 1e9:,.1f} GB/s; memory {result['memory']}")


if __name__ == "__main__":
    main()
