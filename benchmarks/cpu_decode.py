"""Packed weights on a CPU: kernels against torch's dense products and against decoding in every step, and a model.

    python benchmarks/cpu_decode.py [kernels] [threshold] [attention] [model] [--threads 1,2] [--rounds 7]
        [--llama-bench PROGRAM --gguf FILE]

"kernels" times `ops.linear` with packed weights of every format, torch's fp32 and bf16 products, and the reference path
(decode, then multiply, in every step), interleaved round by round; a ratio is taken within a round. Each way goes
through copies of its weights larger together than the last level of cache, as a model's layers do.
"threshold" compares packed with dense for small matrices that stay in the cache.
"attention" times decode attention of 32 sequences at 1K context against gathering the pages and torch's attention.
"model" decodes and prefills an ERNIE-4.5 MoE of random bytes (`benchmarks.random_ernie`) through the executor. With
--llama-bench and --gguf, llama.cpp's program and a model of the same shape (`benchmarks.gguf_file`; docs/llama.cpp.md),
it takes turns with that, and ratios are taken within a turn. "wall" is by the clock, "processor" by the time that the
process had a core, which other programs on the machine disturb less; of several threads it counts their waiting too.

Read the spread with the median, and the load of the machine, which is written down with it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import random_ernie, report
from engine.config import EngineConfig, ModelConfig
from engine.execution.batch import StepInput
from engine.execution.executor import Executor
from kernels import ops
from kernels.cpu.packed import PackedPrepared, pack
from kernels.operands import CcqWeight, Int4Weight, Int8Weight, Weight
from kernels.reference import dequantize

SHAPES = ((2048, 5632), (4096, 4096))
BATCHES = (1, 4, 16, 64)
CACHE_BYTES = 64 << 20
DEFAULT = ["kernels", "attention", "model"]
Timed = Callable[[int], Any]


def wint2(k: int, n: int, *, shared: bool) -> CcqWeight:
    """Random bytes; one codebook for each column, or one for all."""
    return CcqWeight(
        codes=torch.randint(0, 256, (k // 4, n), dtype=torch.uint8),
        group_scales=torch.randint(0, 256, (k // 128, n), dtype=torch.uint8),
        super_scales=torch.full((n,), 1e-3, dtype=torch.bfloat16),
        code_scale=torch.full((n,), 128.5) if shared else 100 + 28 * torch.rand(n),
        code_zp=torch.zeros(n),
        row_order="permuted",
    )


FORMATS: dict[str, Callable[[int, int], Weight]] = {
    "wint2, one codebook": lambda k, n: wint2(k, n, shared=True),
    "wint2, codebooks of columns": lambda k, n: wint2(k, n, shared=False),
    "wint4": lambda k, n: Int4Weight(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.full((n,), 1e-3)),
    "wint8": lambda k, n: Int8Weight(torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.full((n,), 1e-3)),
}


def copies(num_bytes: int) -> int:
    """So many that no cache holds them all."""
    return max(2, -(-CACHE_BYTES // num_bytes))


def seconds(call: Timed, count: int) -> float:
    """A call's time, over one call on each copy."""
    start = time.perf_counter()
    for i in range(count):
        call(i)
    return (time.perf_counter() - start) / count


def interleaved(ways: dict[str, tuple[Timed, int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, by way and round; a first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for r in range(rounds + 1):
        for name, (call, count) in ways.items():
            taken = seconds(call, count)
            if r:
                times[name].append(taken)
    return times


def dense_product(weights: Tensor, x: Tensor) -> Timed:
    """torch's product with one of the copies [copies, N, K]."""
    return lambda i: torch.mm(x, weights[i].t())


def packed_product(weights: list[PackedPrepared], x: Tensor) -> Timed:
    """Ours."""
    return lambda i: ops.linear(x, weights[i])


def decoding_product(weight: Weight, x: Tensor) -> Timed:
    """The reference path."""
    return lambda _: x @ dequantize(weight, torch.float32).t()


def measure_kernels(rounds: int) -> list[dict[str, Any]]:
    """All ways of one shape and one batch take turns."""
    results = []
    for k, n in SHAPES:
        operands = {name: make(k, n) for name, make in FORMATS.items()}
        packed = {
            name: [pack(weight) for _ in range(copies(pack(weight).num_bytes))] for name, weight in operands.items()
        }
        dense = torch.randn(copies(4 * k * n), n, k)
        half = torch.randn(copies(2 * k * n), n, k).bfloat16()
        for batch in BATCHES:
            x = torch.randn(batch, k)
            ways = {
                "torch fp32": (dense_product(dense, x), len(dense)),
                "torch bf16": (dense_product(half, x.bfloat16()), len(half)),
            }
            for name, weight in operands.items():
                ways[f"{name}: packed"] = (packed_product(packed[name], x), len(packed[name]))
                ways[f"{name}: reference"] = (decoding_product(weight, x), 1)
            times = interleaved(ways, rounds)
            for name, values in times.items():
                result: dict[str, Any] = {"k": k, "n": n, "batch": batch, "way": name}
                result["microseconds"] = report.spread([1e6 * t for t in values], 1)
                if name.endswith(": packed"):
                    size = packed[name.removesuffix(": packed")][0].num_bytes
                    result["packed_gb_per_s"] = report.spread([size / t / 1e9 for t in values], 2)
                    for other in (name.replace(": packed", ": reference"), "torch fp32", "torch bf16"):
                        ratios = [b / a for a, b in zip(values, times[other], strict=True)]
                        result[f"times as fast as {other.rpartition(': ')[2]}"] = report.spread(ratios, 2)
                results.append(result)
                print(json.dumps(result), flush=True)
    return results


def measure_threshold(rounds: int) -> list[dict[str, Any]]:
    """Square matrices, one of each in the cache."""
    results = []
    for side in (256, 512, 1024, 1536, 2048):
        for batch in (1, 16):
            x = torch.randn(batch, side)
            ways = {"dense": (dense_product(torch.randn(1, side, side).expand(50, -1, -1), x), 50)}
            for name, make in FORMATS.items():
                ways[name] = (packed_product([pack(make(side, side))] * 50, x), 50)
            for name, values in interleaved(ways, rounds).items():
                spread = report.spread([1e6 * t for t in values], 1)
                results.append({"side": side, "batch": batch, "way": name, "microseconds": spread})
                print(json.dumps(results[-1]), flush=True)
    return results


def one_step(start: int, count: int, vocab_size: int, block_size: int) -> StepInput:
    """`count` tokens of the only request, after `start` others."""
    end = start + count
    positions = np.arange(start, end, dtype=np.int32)
    return StepInput(
        token_ids=((positions * 7919) % vocab_size).astype(np.int32),
        positions=positions,
        slot_mapping=positions.astype(np.int64),
        block_tables=np.arange(-(-end // block_size), dtype=np.int32)[None],
        query_start=np.array([0, count], dtype=np.int32),
        context_lens=np.array([end], dtype=np.int32),
        logits_rows=np.array([count - 1], dtype=np.int32),
    )


PROMPT, ANSWER = 128, 32
"""Tokens of the prompt, and tokens decoded after it."""


def measure_model(folder: Path, config: ModelConfig, threads: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Prefill, then decode after it, for each number of threads in turn, and the peer after each."""
    engine = EngineConfig(
        model=str(folder),
        device="cpu",
        max_model_len=1024,
        max_num_seqs=1,
        num_threads=1,
        quantize_embeddings=options.embeddings,
    )
    began = time.perf_counter()
    executor = Executor.start_local(engine, config)
    loading = time.perf_counter() - began
    turns: dict[int, list[dict[str, float]]] = {count: [] for count in threads}
    peer: dict[str, Any] = {}
    try:
        executor.execute(one_step(0, 8, config.vocab_size, executor.block_size))
        for r in range(options.rounds + 1):
            for count in threads:
                torch.set_num_threads(count)  # the worker sets its own in its first step only
                turn = our_turn(executor, config.vocab_size)
                if options.llama_bench:
                    peer = llama(options, count)
                    for kind in tuple(turn):
                        turn[f"llama.cpp {kind}"] = peer[kind]
                        turn[f"{kind}, times llama.cpp"] = turn[kind] / peer[kind]
                turn["load"] = os.getloadavg()[0]
                if r:
                    turns[count].append(turn)
                    print(count, turn, flush=True)
    finally:
        executor.shutdown()
    parameters, size = random_ernie.parameters(config), folder_bytes(folder)
    result = {
        "shape": random_ernie.SHAPE,
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": round(8 * size / parameters, 3),
        "dense": options.dense,
        "embeddings": options.embeddings or "bf16",
        "loading_seconds": round(loading, 1),
        "tokens_per_second_by_threads": {
            count: {kind: report.spread([turn[kind] for turn in values], 3) for kind in values[0]}
            for count, values in turns.items()
        },
    }
    if peer:
        result["llama.cpp"] = peer["model"]
    return result


def our_turn(executor: Executor, vocab_size: int) -> dict[str, float]:
    """Tokens a second."""
    moments = [(time.perf_counter(), time.process_time())]
    executor.execute(one_step(0, PROMPT, vocab_size, executor.block_size))
    moments.append((time.perf_counter(), time.process_time()))
    for i in range(ANSWER):
        executor.execute(one_step(PROMPT + i, 1, vocab_size, executor.block_size))
    moments.append((time.perf_counter(), time.process_time()))
    return {
        f"{kind}, {clock}": tokens / (moments[i + 1][c] - moments[i][c])
        for i, (kind, tokens) in enumerate((("prefill", PROMPT), ("decode", ANSWER)))
        for c, clock in enumerate(("wall", "processor"))
    }


def folder_bytes(folder: Path) -> int:
    """Of the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def llama(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """What llama-bench says of the peer's model, and the processor time that three repetitions take more than one."""
    result: dict[str, Any] = {}
    for kind, prompt, answer in (("prefill", PROMPT, 0), ("decode", 0, ANSWER)):
        seconds = {}
        for repetitions in (1, 3):
            command = [options.llama_bench, "-m", options.gguf, "-t", str(threads), "-r", str(repetitions)]
            command += ["-p", str(prompt), "-n", str(answer), "-o", "json"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds[repetitions] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            (test,) = json.loads(done.stdout)
        result[f"{kind}, wall"] = test["avg_ts"]
        result[f"{kind}, processor"] = 2 * (prompt + answer) / max(1e-9, seconds[3] - seconds[1])
        result["model"] = {
            "type": test["model_type"],
            "bytes": test["model_size"],
            "parameters": test["model_n_params"],
            "bits_per_weight": round(8 * test["model_size"] / test["model_n_params"], 3),
        }
    return result


def measure_attention(rounds: int) -> list[dict[str, Any]]:
    """Decode attention of 32 sequences at 1K context, 12 heads over 4 kv heads of 128."""
    requests, context, kv_heads, heads, head_dim, block_size = 32, 1024, 4, 12, 128, 16
    per = context // block_size
    pages = torch.randn(2, requests * per, block_size, kv_heads, head_dim)
    cache, q = ops.LayerCache(*pages), torch.randn(requests, heads, head_dim)
    arrays = (
        np.random.default_rng(0).permutation(requests * per).astype(np.int32).reshape(requests, per),
        np.arange(requests + 1, dtype=np.int32),
        np.full(requests, context, dtype=np.int32),
    )
    metadata = ops.attention_metadata(*arrays, block_size=block_size, dtype=torch.float32, device=q.device)
    blocks = torch.from_numpy(arrays[0].astype(np.int64)).flatten()

    def gathered(_: int) -> Tensor:
        k, v = (
            p.index_select(0, blocks).view(requests, context, kv_heads, head_dim).transpose(1, 2) for p in pages
        )  # fmt: skip
        return F.scaled_dot_product_attention(q.view(requests, kv_heads, -1, head_dim), k, v)

    ways: dict[str, tuple[Timed, int]] = {
        "compiled": (lambda _: ops.paged_attention(q, cache, metadata, scale=head_dim**-0.5), 3),
        "gathered": (gathered, 3),
    }
    times = interleaved(ways, rounds)
    ratios = [b / a for a, b in zip(times["compiled"], times["gathered"], strict=True)]
    result = {
        "requests": requests,
        "context": context,
        "milliseconds": {name: report.spread([1e3 * t for t in values], 2) for name, values in times.items()},
        "times as fast as gathered": report.spread(ratios, 2),
    }
    print(json.dumps(result), flush=True)
    return [result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["kernels", "threshold", "attention", "model"], default=DEFAULT)
    parser.add_argument("--threads", default="1,2", help="of the model, in turns; kernels use the first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dense", choices=random_ernie.DENSE, default="wint8", help="format of what is no expert")
    parser.add_argument("--embeddings", choices=["int8", "int4"], help="format of embedding and head; bf16 by default")
    parser.add_argument("--llama-bench", help="llama.cpp's program of that name")
    parser.add_argument("--gguf", help="its model")
    options = parser.parse_args()
    if bool(options.llama_bench) != bool(options.gguf):
        parser.error("--llama-bench and --gguf go together")
    threads = [int(count) for count in options.threads.split(",")]
    torch.manual_seed(0)
    torch.set_num_threads(threads[0])
    result: dict[str, Any] = report.context(["torch", "numpy", "numba"])
    result |= {"kernel_threads": threads[0], "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set")}
    with torch.inference_mode():
        if "kernels" in options.parts:
            result["kernels"] = measure_kernels(options.rounds)
        if "attention" in options.parts:
            result["attention"] = measure_attention(options.rounds)
        if "threshold" in options.parts:
            result["threshold"] = measure_threshold(options.rounds)
    if "model" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            result["model"] = measure_model(path, random_ernie.write(path, options.dense), threads, options)
            print(json.dumps(result["model"], indent=2), flush=True)
    print(report.write("cpu-decode", result))


if __name__ == "__main__":
    main()
