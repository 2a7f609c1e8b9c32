"""What serving adds to an engine: time to first token, time per token, tokens and Ray messages per second.

The engine is synthetic: a step takes a set time and gives every request one token. Everything between it and the
client is what users run. Beside it, on the same server and in turns, the naive path (ingress -> handle(stream=True) ->
engine, one item for each token of each request) and the floor (an ingress that generates by itself). Client, proxy,
ingress and engine share this machine's cores.

    python -m benchmarks.serving                            # HAProxy and Python proxy, steps of 5 and 20 ms
    python -m benchmarks.serving --quick
    python -m benchmarks.serving --soak 10000 --proxy haproxy
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import report
from benchmarks.serve_process import ServeProcess
from benchmarks.serving.counters import FOLDER, Messages
from benchmarks.serving.load import Client, Outcome
from benchmarks.serving.measures import Numbers, measure, summarize, table
from benchmarks.serving.memory import Sample, growth, resident_mib
from benchmarks.serving.synthetic import STEP_SECONDS

MODEL = str(report.ROOT / "examples" / "ernie-tiny" / "2bits")
PATHS = {"ours": "/v1/completions", "naive": "/naive/v1/completions", "floor": "/floor/v1/completions"}
QUICK = {"concurrency": [1, 32], "poisson": [8], "rounds": 1, "step_ms": [5.0], "proxy": ["python"]}
SOAK_CLIENTS = 32
SOAK_TOKENS = 20
SOAK_SAMPLES = 100


class Server:
    """The three applications on one Serve."""

    def __init__(self, folder: Path, *, step_seconds: float, haproxy: bool, paths: list[str]) -> None:
        self._counters = folder / "counters"
        self._counters.mkdir()
        environment = {
            # Ray's own niceness of 15 would measure what else the machine is doing.
            "RAY_worker_niceness": "0",
            STEP_SECONDS: str(step_seconds),
            FOLDER: str(self._counters),
        }
        engine = {"max_num_seqs": 1024, "max_model_len": 1024}
        args = {"model": MODEL, "served_model_name": "synthetic", "engine": engine}
        beside = [
            {
                "name": name,
                "route_prefix": f"/{name}",
                "import_path": f"benchmarks.serving.apps:{name}",
                "args": {"model": MODEL},
            }
            for name in paths
            if name != "ours"
        ]
        self.process = ServeProcess(
            args,
            folder,
            environment=environment,
            import_path="benchmarks.serving.apps:ours",
            beside=beside,
            haproxy=haproxy,
        )

    def messages(self, path: str) -> Messages:
        """Between ingress and engine so far."""
        return Messages.read(self._counters, path)


class Bench:
    """All loads on one server."""

    def __init__(self, server: Server, options: argparse.Namespace, *, step_seconds: float) -> None:
        self._server = server
        self._options = options
        self._step_seconds = step_seconds
        self._client = Client("127.0.0.1", server.process.port, num_tokens=options.output_tokens)
        self.errors: list[str] = []

    async def run(self) -> list[dict[str, Any]]:
        """Everything, one summary for each load."""
        for path in self._options.path:
            for concurrency in (1, 8, *sorted(self._options.concurrency)):  # a router must learn how fast an engine is
                outcome = await self._client.burst(PATHS[path], concurrency)
                self.errors += [f"warming up: {error}" for error in outcome.errors]
        results = []
        for concurrency in self._options.concurrency:
            each = max(1, 6 // concurrency)

            async def burst(path: str, _: int, concurrency: int = concurrency, each: int = each) -> Outcome:
                return await self._client.burst(path, concurrency, each=each)

            results.append({"load": "burst", "concurrency": concurrency} | await self._rounds(burst))
            self._show(results[-1], f"{concurrency} at once")
        for in_flight in self._options.poisson:
            per_second = in_flight / (self._options.output_tokens * self._step_seconds)

            async def poisson(path: str, seed: int, per_second: float = per_second) -> Outcome:
                return await self._client.poisson(
                    path, per_second=per_second, seconds=self._options.poisson_seconds, seed=seed
                )

            load = {"load": "poisson", "requests_per_second": per_second, "in_flight_ideally": in_flight}
            results.append(load | await self._rounds(poisson))
            self._show(results[-1], f"Poisson, {per_second:.0f}/s, {in_flight} under way ideally")
        self._client.close()
        return results

    async def _rounds(self, load: Callable[[str, int], Awaitable[Outcome]]) -> dict[str, Any]:
        rounds = []
        for number in range(self._options.rounds):
            measured: dict[str, Numbers] = {}
            paths = self._options.path if number % 2 == 0 else self._options.path[::-1]
            for path in paths:
                before = self._server.messages(path)
                outcome = await load(PATHS[path], number)
                self.errors += outcome.errors
                messages = self._server.messages(path) - before
                measured[path] = measure([outcome], step_seconds=self._step_seconds, messages=messages)
            rounds.append({path: measured[path] for path in self._options.path})
        spelled = [{p: {k: round(v, 3) for k, v in numbers.items()} for p, numbers in r.items()} for r in rounds]
        return summarize(rounds) | {"rounds": spelled}

    def _show(self, result: dict[str, Any], title: str) -> None:
        print(f"{1e3 * self._step_seconds:g} ms steps, {title}")
        print("\n".join(table(result)), flush=True)


async def soak(server: Server, count: int) -> dict[str, Any]:
    """Many requests, and the memory of every process."""
    client = Client("127.0.0.1", server.process.port, num_tokens=SOAK_TOKENS)
    await client.burst(PATHS["ours"], SOAK_CLIENTS)
    samples: list[tuple[int, Sample]] = []
    errors: list[str] = []
    done = 0
    started = time.perf_counter()
    each = max(1, count // SOAK_SAMPLES // SOAK_CLIENTS)
    pids = server.process.pids()
    while done < count:
        outcome = await client.burst(PATHS["ours"], SOAK_CLIENTS, each=each)
        done += len(outcome.timings) + len(outcome.errors)
        errors += outcome.errors
        samples.append((done, resident_mib(pids)))
        if len(samples) % 10 == 0:
            total = sum(samples[-1][1].values())
            rate = done / (time.perf_counter() - started)
            print(f"  {done} requests, {len(errors)} errors, {rate:.0f}/s, {total:.0f} MiB in all", flush=True)
    client.close()
    living = server.process.pids()
    gone = [command for pid, command in pids.items() if pid not in living]
    memory = growth(samples)
    for name, found in memory.items():
        print(
            f"  {name:60} {found['first_mib']:7.1f} -> {found['last_mib']:7.1f} MiB"
            f"  {found['mib_per_1000_requests']:+.3f} MiB/1000 requests"
        )
    return {
        "requests": done,
        "errors": len(errors),
        "first_errors": errors[:5],
        "seconds": round(time.perf_counter() - started, 1),
        "processes_lost": gone,
        "memory": memory,
    }


def serve(options: argparse.Namespace, *, proxy: str, step_ms: float) -> dict[str, Any]:
    """Start a server, load it, and end it."""
    with tempfile.TemporaryDirectory(prefix="dibit-") as name:
        paths = ["ours"] if options.soak else options.path
        server = Server(Path(name), step_seconds=step_ms / 1e3, haproxy=proxy == "haproxy", paths=paths)
        print(f"starting Serve ({proxy} proxy, {step_ms:g} ms steps)", flush=True)
        result: dict[str, Any] = {"proxy": proxy, "step_ms": step_ms}
        with server.process:
            if options.soak:
                result |= uvloop.run(soak(server, options.soak))
            else:
                bench = Bench(server, options, step_seconds=step_ms / 1e3)
                result["results"] = uvloop.run(bench.run())
                result["errors"] = len(bench.errors)
                result["first_errors"] = bench.errors[:5]
                for error in bench.errors[:3]:
                    print(f"  error: {error}")
            started = time.perf_counter()
        result["shutdown_seconds"] = round(time.perf_counter() - started, 1)
        result["left_over"] = server.process.remaining()
        print(f"  ended in {result['shutdown_seconds']} s; left over: {result['left_over'] or 'nothing'}", flush=True)
        return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32, 128, 256], help="requests at once")
    parser.add_argument("--poisson", type=int, nargs="*", default=[8, 32], help="requests that would be under way")
    parser.add_argument("--poisson-seconds", type=float, default=3.0)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[5.0, 20.0])
    parser.add_argument("--proxy", nargs="+", choices=["haproxy", "python"], default=["haproxy", "python"])
    parser.add_argument("--path", nargs="+", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-tokens", type=int, default=100)
    parser.add_argument("--soak", type=int, default=0, help="instead, so many requests in a row, watching memory")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    if options.soak and options.step_ms == [5.0, 20.0]:
        options.step_ms = [5.0]
    return options


def main() -> None:
    options = _arguments()
    result = report.context(["ray", "uvicorn", "starlette", "msgspec", "uvloop"])
    result["command"] = result["command"].replace("benchmarks/serving/__main__.py", "-m benchmarks.serving")
    result["options"] = vars(options)
    runs = [serve(options, proxy=proxy, step_ms=step_ms) for step_ms in options.step_ms for proxy in options.proxy]
    result["runs"] = runs
    name = "soak" if options.soak else "serving"
    print(f"written to {report.write(name, result)}")


if __name__ == "__main__":
    main()
