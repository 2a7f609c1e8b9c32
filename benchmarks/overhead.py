"""Serving over HTTP beside the engine alone: time to first token, time per token, tokens per second.

Each round gives the same requests to ``serve run`` over HTTP and to an engine in this process, one right after the
other and in turns first, so that both see the same machine; ratios are taken within a round. Every client sends its
next request when the last one is complete. The result is a file in ``benchmarks/results``.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --concurrency 1 8 32 --rounds 5 --haproxy
    python -m benchmarks.overhead --url http://127.0.0.1:8000 --served-model-name bf16
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import resource
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from benchmarks import report
from benchmarks.http_client import Connection, Timing, encode
from benchmarks.serve_process import ServeProcess
from engine.config import EngineConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import EngineDeadError
from engine.execution.executor import Executor
from engine.loop import EngineLoop
from engine.messages import EngineRequest, StepOutput
from engine.requests import expand
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for."""

    num_prompt_tokens: int
    num_output_tokens: int
    requests_per_client: int

    def prompts(self, seed: int, concurrency: int, vocab_size: int) -> list[list[int]]:
        """Random prompts, the same for the same seed; no two begin alike, so no prefix is cached."""
        rng = random.Random(seed)
        count = concurrency * self.requests_per_client
        return [[rng.randrange(300, vocab_size) for _ in range(self.num_prompt_tokens)] for _ in range(count)]


class Target(Protocol):
    """Something that continues prompts."""

    def run(self, prompts: Sequence[list[int]], concurrency: int) -> list[Timing]:
        """Have ``concurrency`` clients send all prompts, each its next one when the last is complete."""


def measure(target: Target, prompts: Sequence[list[int]], concurrency: int) -> dict[str, float]:
    """Run all prompts and sum up."""
    cpu = _cpu_seconds()
    started = time.perf_counter()
    timings = target.run(prompts, concurrency)
    seconds = time.perf_counter() - started
    tokens = sum(timing.num_tokens for timing in timings)
    ttft = [1e3 * timing.ttft for timing in timings]
    tpot = [1e3 * timing.tpot for timing in timings]
    return {
        "tokens_per_second": tokens / seconds,
        "ttft_p50_ms": report.percentile(ttft, 50),
        "ttft_p99_ms": report.percentile(ttft, 99),
        "tpot_p50_ms": report.percentile(tpot, 50),
        "tpot_p99_ms": report.percentile(tpot, 99),
        "benchmark_cpu_us_per_token": 1e6 * (_cpu_seconds() - cpu) / tokens,
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class HttpTarget:
    """A server, with one connection for each client."""

    def __init__(self, url: str, model: str, load: Load) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = f"{parts.path.rstrip('/')}/v1/completions"
        self._body = {"model": model, "max_tokens": load.num_output_tokens, "ignore_eos": True}

    def run(self, prompts: Sequence[list[int]], concurrency: int) -> list[Timing]:
        """See :class:`Target`."""
        return asyncio.run(self._run(prompts, concurrency))

    async def _run(self, prompts: Sequence[list[int]], concurrency: int) -> list[Timing]:
        waiting = [encode({**self._body, "prompt": prompt, "seed": sum(prompt)}) for prompt in reversed(prompts)]
        timings: list[Timing] = []

        async def client() -> None:
            connection = await Connection.open(self._host, self._port)
            while waiting:
                timings.append(await connection.stream(self._path, waiting.pop()))
            connection.close()

        await asyncio.gather(*[client() for _ in range(concurrency)])
        return timings


class EngineTarget:
    """The engine in this process, and nothing beside it.

    The next request is sent from the engine's own callback while the main thread sleeps: an event loop beside the
    engine would take Python's lock from it at every step, and the baseline would be slower than the server.
    """

    def __init__(self, options: EngineConfig, load: Load) -> None:
        model = ModelConfig.from_folder(options.model)
        self.tokenizer = Tokenizer.from_folder(options.model)
        self._executor = Executor.start_local(options, model)
        used_vocab_size = min(self.tokenizer.used_vocab_size, model.vocab_size)
        core = EngineCore(options, model, self._executor, used_vocab_size=used_vocab_size, eos_token_ids=())
        self._engine = EngineLoop(core, on_step=self._on_step, on_error=self._on_error)
        self._engine.start()
        self._load = load
        self._waiting: list[EngineRequest] = []
        self._under_way: dict[str, Timing] = {}
        self._timings: list[Timing] = []
        self._done = threading.Event()
        self._failure: EngineDeadError | None = None
        self._count = itertools.count()

    def run(self, prompts: Sequence[list[int]], concurrency: int) -> list[Timing]:
        """See :class:`Target`; the requests that :class:`HttpTarget` sends, past HTTP, Ray and text."""
        self._waiting = [self._request(prompt) for prompt in reversed(prompts)]
        self._timings = []
        self._done.clear()
        self._submit(concurrency)
        self._done.wait()
        if self._failure is not None:
            raise self._failure
        return self._timings

    def close(self) -> None:
        """End the engine."""
        self._engine.stop()

    def _request(self, prompt: list[int]) -> EngineRequest:
        params = SamplingParams(max_tokens=self._load.num_output_tokens, ignore_eos=True, seed=sum(prompt))
        (request,) = expand(
            prompt, params, max_model_len=self._executor.max_model_len, request_id=f"request-{next(self._count)}"
        )
        return request

    def _submit(self, count: int) -> None:
        requests = [self._waiting.pop() for _ in range(min(count, len(self._waiting)))]
        now = time.perf_counter()
        for request in requests:
            self._under_way[request.request_id] = Timing(sent=now, first=0.0, last=0.0, num_tokens=0)
        self._engine.submit(requests)

    def _on_step(self, output: StepOutput) -> None:
        now = time.perf_counter()
        finished = 0
        for delta in output.deltas:
            timing = self._under_way[delta.request_id]
            timing = replace(
                timing, first=timing.first or now, last=now, num_tokens=timing.num_tokens + len(delta.token_ids)
            )
            self._under_way[delta.request_id] = timing
            if delta.finish_reason is not None:
                self._timings.append(self._under_way.pop(delta.request_id))
                finished += 1
        if finished:
            self._submit(finished)
            if not self._under_way:
                self._done.set()

    def _on_error(self, error: EngineDeadError) -> None:
        self._failure = error
        self._done.set()


def run(options: argparse.Namespace, url: str, model: str) -> list[dict[str, Any]]:
    """All rounds of all concurrencies."""
    load = Load(options.prompt_tokens, options.output_tokens, options.requests_per_client)
    engine = EngineTarget(EngineConfig(model=options.model, **_engine_options(options)), load)
    targets: dict[str, Target] = {"engine": engine, "http": HttpTarget(url, model, load)}
    results = []
    try:
        for concurrency in options.concurrency:
            rounds: list[dict[str, dict[str, float]]] = []
            for number in range(-1, options.rounds):  # round -1 warms both up
                prompts = load.prompts(1000 * concurrency + number, concurrency, engine.tokenizer.used_vocab_size)
                order = sorted(targets, reverse=number % 2 == 1)
                measured = {name: measure(targets[name], prompts, concurrency) for name in order}
                if number >= 0:
                    rounds.append(measured)
            results.append(summarize(concurrency, rounds))
            print(line(results[-1]), flush=True)
    finally:
        engine.close()
    return results


def summarize(concurrency: int, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Spread of every number over the rounds, and of the ratios within a round."""
    summary: dict[str, Any] = {"concurrency": concurrency}
    for name in ("engine", "http"):
        summary[name] = {key: report.spread([r[name][key] for r in rounds]) for key in rounds[0][name]}
    pairs = [(r["http"], r["engine"]) for r in rounds]
    summary["http_over_engine"] = {
        "tokens_per_second": report.spread([h["tokens_per_second"] / e["tokens_per_second"] for h, e in pairs]),
        "tpot_p50": report.spread([h["tpot_p50_ms"] / e["tpot_p50_ms"] for h, e in pairs]),
        "added_ttft_p50_ms": report.spread([h["ttft_p50_ms"] - e["ttft_p50_ms"] for h, e in pairs]),
        "added_ttft_p99_ms": report.spread([h["ttft_p99_ms"] - e["ttft_p99_ms"] for h, e in pairs]),
    }
    summary["rounds"] = [{name: {key: round(value, 3) for key, value in r[name].items()} for name in r} for r in rounds]
    return summary


def line(result: dict[str, Any]) -> str:
    """A result for the terminal."""
    http, engine, ratio = result["http"], result["engine"], result["http_over_engine"]
    share = ratio["tokens_per_second"]
    return (
        f"c={result['concurrency']:3d}  tokens/s {http['tokens_per_second']['median']:8.1f} of "
        f"{engine['tokens_per_second']['median']:8.1f} = {share['median']:.3f} "
        f"({share['min']:.3f}-{share['max']:.3f})  "
        f"TTFT p50 {http['ttft_p50_ms']['median']:.1f} ms (+{ratio['added_ttft_p50_ms']['median']:.1f}), "
        f"p99 {http['ttft_p99_ms']['median']:.1f}  TPOT p50 {http['tpot_p50_ms']['median']:.2f} ms "
        f"(engine {engine['tpot_p50_ms']['median']:.2f}), p99 {http['tpot_p99_ms']['median']:.2f}"
    )


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": "cpu",
        "max_num_seqs": max(options.concurrency),
        "max_model_len": options.prompt_tokens + options.output_tokens,
        "num_threads": options.num_threads,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = report.ROOT / "examples" / "ernie-tiny" / "2bits"
    parser.add_argument("--model", default=str(default), help="model folder, for both sides")
    parser.add_argument("--url", help="a server that runs already; otherwise one is started and stopped")
    parser.add_argument("--served-model-name", help="the model's name at --url")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests-per-client", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=100)
    parser.add_argument("--num-threads", type=int, default=1, help="of each engine")
    parser.add_argument("--haproxy", action="store_true", help="start Serve with HAProxy in place of its Python proxy")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    result = report.context(["torch", "ray", "uvicorn", "starlette", "msgspec"])
    with ExitStack() as stack:
        url, model = options.url, options.served_model_name
        if url is None:
            model = "benchmark"
            args = {"model": options.model, "served_model_name": model, "engine": _engine_options(options)}
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dibit-benchmark-")))
            # As `make serve` sets it: Ray's own niceness of 15 would measure what else the machine is doing.
            environment = {"RAY_worker_niceness": "0"}
            result["environment"] = environment
            url = stack.enter_context(ServeProcess(args, folder, environment=environment, haproxy=options.haproxy)).url
        elif model is None:
            model = Path(options.model).name
        result["proxy"] = "given" if options.url else "haproxy" if options.haproxy else "python"
        result["load"] = {
            key: getattr(options, key)
            for key in ("prompt_tokens", "output_tokens", "requests_per_client", "rounds", "num_threads")
        } | {"model": Path(options.model).name}
        result["results"] = run(options, url, model)
    print(f"written to {report.write('serving', result)}")


if __name__ == "__main__":
    main()
