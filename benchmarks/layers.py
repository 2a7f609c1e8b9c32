"""Errors and times of the encoders on random layers with correlated inputs.

The error is that of the output on the calibration inputs, ``tr((Q - W) H (Q - W)^T) / tr(W H W^T)``, Q being what a
server decodes from the stored bytes. Two kinds of layers, each with several seeds:

* smooth: Gaussian weights; inputs whose covariance has a spectrum i^-1.15 in a random basis.
* uneven: Student-t weights (6 degrees of freedom); the same inputs, each scaled by a log-normal factor, four of
  them by 8 more, as the inputs of trained models are.

Times are of one thread and interleaved: in each round every method encodes the same layer once, with the factor of its
Hessian made anew, and ratios to GPTQ are taken within the round. The result is a file in ``benchmarks/results``.

    python -m benchmarks.layers
    python -m benchmarks.layers --seeds 2 --rounds 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from engine.compress import bpdq, ccq, gptq, rtn
from engine.compress.hessian import Metric
from engine.compress.packed import PackedWeight

Encode = Callable[[Tensor, Metric], PackedWeight]

METHODS: dict[str, Encode] = {
    "RTN-2 g64, clipped": lambda w, m: rtn.quantize(w, m, bits=2, group_size=64, clip=True),
    "GPTQ-2 g64, min/max grid": lambda w, m: gptq.quantize(w, m, bits=2, group_size=64, clip=False),
    "GPTQ-2 g64, clipped": lambda w, m: gptq.quantize(w, m, bits=2, group_size=64),
    "GPTQ-2 g128, clipped": lambda w, m: gptq.quantize(w, m, bits=2, group_size=128),
    "GPTQ-2 g64, clipped, 3 sweeps": lambda w, m: gptq.quantize(w, m, bits=2, group_size=64, sweeps=3),
    "BPDQ k=2 g64": lambda w, m: bpdq.quantize(w, m, planes=2, group_size=64),
    "BPDQ k=2 g128": lambda w, m: bpdq.quantize(w, m, planes=2, group_size=128),
    "BPDQ k=2 g256": lambda w, m: bpdq.quantize(w, m, planes=2, group_size=256),
    "BPDQ k=2 g256, 3 sweeps": lambda w, m: bpdq.quantize(w, m, planes=2, group_size=256, sweeps=3),
    "BPDQ k=3 g128": lambda w, m: bpdq.quantize(w, m, planes=3, group_size=128),
    "CCQ fast": lambda w, m: ccq.quantize(w, m, options="fast"),
    "CCQ default": ccq.quantize,
    "CCQ default, a codebook a column": lambda w, m: ccq.quantize(w, m, codebook="column"),
    "CCQ best": lambda w, m: ccq.quantize(w, m, options="best"),
}
BASELINE = "GPTQ-2 g64, clipped"
TIMED = ("GPTQ-2 g64, clipped", "BPDQ k=2 g64", "BPDQ k=2 g128", "CCQ fast", "CCQ default")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="layers of each kind (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=2, default=(256, 512), metavar=("N", "K"), help="of those layers")
    parser.add_argument("--timed-shape", type=int, nargs=2, default=(1024, 2048), metavar=("N", "K"))
    parser.add_argument("--rounds", type=int, default=3, help="of timing (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    context = report.context(["torch"])
    n, k = options.shape
    errors = {kind: layer_errors(kind, n, k, options.seeds) for kind in ("smooth", "uneven")}
    n, k = options.timed_shape
    result = {**context, "shape": list(options.shape), "errors": errors, "cost": costs(n, k, options.rounds)}
    print(report.write("layers", result))
    print(table(result))


def layer(kind: str, n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights [N, K] and H [K, K], fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -1.15
    basis, _ = torch.linalg.qr(normal(k, k))
    inputs = (normal(4 * k, k) * spectrum.sqrt()) @ basis.T
    weight = 0.03 * normal(n, k)
    if kind == "uneven":
        inputs = inputs * (0.5 * normal(k)).exp()
        inputs[:, torch.randperm(k, generator=generator)[:4]] *= 8
        chi = sum(normal(n, k).square() for _ in range(6))
        weight = weight / (chi / 6).sqrt()
    return weight.float(), inputs.T @ inputs


def layer_errors(kind: str, n: int, k: int, seeds: int) -> dict[str, dict[str, Any]]:
    """Of every method: bits a weight, and the relative error on each of the layers."""
    found: dict[str, dict[str, Any]] = {}
    for seed in range(seeds):
        weight, hessian = layer(kind, n, k, seed)
        metric = Metric.of(hessian, k, device=weight.device)
        full = weight.double()
        for name, encode in METHODS.items():
            packed = encode(weight, metric)
            off = packed.dequantize().double() - full
            error = float(((off @ hessian) * off).sum() / ((full @ hessian) * full).sum())
            entry = found.setdefault(name, {"bits_per_weight": round(packed.bits_per_weight, 4), "errors": []})
            entry["errors"].append(round(error, 6))
    baseline = found[BASELINE]["errors"]
    for entry in found.values():
        ratios = [one / other for one, other in zip(entry["errors"], baseline, strict=True)]
        entry["mean"] = round(sum(entry["errors"]) / seeds, 5)
        entry["ratio_to_gptq"] = report.spread(ratios)
    return found


def costs(n: int, k: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of each method and the ratio to GPTQ's in the same round; weights a second."""
    weight, hessian = layer("smooth", n, k, 0)
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for _ in range(rounds):
        for name in TIMED:
            started = time.thread_time()
            METHODS[name](weight, Metric.of(hessian, k, device=weight.device))
            seconds[name].append(time.thread_time() - started)
    return {
        "shape": [n, k],
        "methods": {
            name: {
                "cpu_seconds": report.spread(taken),
                "ratio_to_gptq": report.spread([t / g for t, g in zip(taken, seconds[BASELINE], strict=True)], 2),
                "weights_per_second": round(n * k / sorted(taken)[len(taken) // 2]),
            }
            for name, taken in seconds.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """For people, in Markdown."""
    lines = [
        "| method | bits a weight | smooth | ratio to GPTQ g64 | uneven | ratio to GPTQ g64 |",
        "|---|---|---|---|---|---|",
    ]
    errors = result["errors"]
    for name in METHODS:
        smooth, uneven = errors["smooth"][name], errors["uneven"][name]
        cells = [f"{smooth['bits_per_weight']:.2f}"]
        for kind in (smooth, uneven):
            low, high = min(kind["errors"]), max(kind["errors"])
            ratio = kind["ratio_to_gptq"]
            cells.append(f"{kind['mean']:.4f} ({low:.4f}-{high:.4f})")
            cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cost = result["cost"]
    lines += ["", f"| method | CPU seconds for {cost['shape']} | ratio to GPTQ |", "|---|---|---|"]
    for name, entry in cost["methods"].items():
        seconds, ratio = entry["cpu_seconds"], entry["ratio_to_gptq"]
        lines.append(f"| {name} | {seconds['median']:.2f} | {ratio['median']} ({ratio['min']}-{ratio['max']}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
