"""Times of short pieces of work on a device, side by side and from memory rather than from caches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.report import percentile

FLUSH_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
"""Written between two measurements; the L2 cache of an H200 has 50 MB. A CPU's run is about its code paths only."""
COPY_BYTES = {"cuda": 2**30, "cpu": 16 * 2**20}

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one piece of work.

    Attributes:
        median: of the rounds.
        low: the tenth percentile.
        high: the ninetieth.
        captured: whether a CUDA graph was timed, and so no launch from Python.
    """

    median: float
    low: float
    high: float
    captured: bool


def pick_device(name: str) -> torch.device:
    """The device a benchmark was asked to run on; ends the program with one line where it isn't there."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: torch sees none; --device cpu --scale tiny runs the same code on the CPU")
    return torch.device(name)


def measure(works: Sequence[Work], *, device: torch.device, rounds: int) -> list[Times]:
    """Time each piece of work once a round, one after the other, so that drift of clocks meets all alike.

    Args:
        works: run on `device`'s current stream, do not wait for it, and give the same result each time.
        device: a GPU's events, or a CPU's clock.
        rounds: measurements of each.
    """
    ready = [_captured(work) if device.type == "cuda" else (work, False) for work in works]
    for run, _ in ready:
        run()
    scratch = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for (run, _), taken in zip(ready, seconds, strict=True):
            scratch.zero_()
            taken.append(clock(run))
    return [
        Times(percentile(taken, 50), percentile(taken, 10), percentile(taken, 90), captured)
        for taken, (_, captured) in zip(seconds, ready, strict=True)
    ]


def copy_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """Bytes a second, read and written, of torch's copy of a large tensor: what memory gives on this machine today."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (times,) = measure([lambda: target.copy_(source)], device=device, rounds=rounds)
    return 2 * source.numel() / times.median


def _captured(work: Work) -> tuple[Work, bool]:
    """The work as a CUDA graph, or as it is where it can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            work()
    except RuntimeError as error:
        print(f"timed without a CUDA graph: {error}".partition("\n")[0], file=sys.stderr)
        return work, False
    return graph.replay, True


def _cuda_seconds(run: Work) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def _cpu_seconds(run: Work) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
