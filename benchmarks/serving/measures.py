"""What is read off the requests of one load.

* ``ttft_overhead``: from sending a request to the first byte of its stream, less one step, which is when a server that
  takes no time would have its first token. What a request waits for the step under way is in it.
* ``tpot_overhead``: mean time between a request's tokens, less a step.
* ``tokens_per_second``: all tokens over the time from the first request to the end of the last.
* ``items_per_second``, ``calls_per_second``: Ray messages between ingress and engine, see ``counters``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.serving.counters import Messages
from benchmarks.serving.load import Outcome

Numbers = dict[str, float]


def measure(outcomes: Sequence[Outcome], *, step_seconds: float, messages: Messages) -> Numbers:
    """The numbers of one or several loads of a kind."""
    timings = [timing for outcome in outcomes for timing in outcome.timings]
    errors = sum(len(outcome.errors) for outcome in outcomes)
    numbers: Numbers = {
        "requests": len(timings),
        "errors": errors,
        "reconnects": sum(outcome.reconnects for outcome in outcomes),
    }
    if not timings:
        return numbers
    tokens = sum(timing.num_tokens for timing in timings)
    seconds = sum(outcome.seconds for outcome in outcomes)
    ttft = [1e3 * (timing.ttft - step_seconds) for timing in timings]
    tpot = [1e3 * (timing.tpot - step_seconds) for timing in timings]
    cpu = sum(outcome.client_cpu_seconds for outcome in outcomes)
    return numbers | {
        "tokens_per_second": tokens / seconds,
        "ttft_overhead_p50_ms": report.percentile(ttft, 50),
        "ttft_overhead_p99_ms": report.percentile(ttft, 99),
        "tpot_overhead_p50_ms": report.percentile(tpot, 50),
        "tpot_overhead_p99_ms": report.percentile(tpot, 99),
        "items_per_second": messages.items / seconds,
        "calls_per_second": messages.calls / seconds,
        "benchmark_cpu_us_per_token": 1e6 * cpu / tokens,
    }


def summarize(rounds: Sequence[Mapping[str, Numbers]]) -> dict[str, Any]:
    """Spread of each number over the rounds, and of ours over the others' within a round."""
    summary: dict[str, Any] = {}
    for path in rounds[0]:
        summary[path] = {
            key: report.spread([numbers[path][key] for numbers in rounds])
            for key in rounds[0][path]
            if all(key in numbers[path] for numbers in rounds)
        }
    for other in sorted(set(rounds[0]) - {"ours"}):
        pairs = [(numbers["ours"], numbers[other]) for numbers in rounds]
        rates = [
            (mine["tokens_per_second"], theirs["tokens_per_second"])
            for mine, theirs in pairs
            if "tokens_per_second" in mine and "tokens_per_second" in theirs
        ]
        if rates:
            summary[f"ours_over_{other}"] = {
                "tokens_per_second": report.spread([mine / theirs for mine, theirs in rates])
            }
    return summary


def table(summary: Mapping[str, Any]) -> list[str]:
    """A line for each path."""
    lines = []
    for path in ("ours", "naive", "floor"):
        if (found := summary.get(path)) is None or "tokens_per_second" not in found:
            continue
        rate, first, rest = (found[k] for k in ("tokens_per_second", "ttft_overhead_p50_ms", "tpot_overhead_p50_ms"))
        ratio = summary.get(f"ours_over_{path}", {}).get("tokens_per_second")
        against = (
            "" if ratio is None else f"  ours/{path} {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
        errors = f"  ERRORS {found['errors']['max']:.0f}" if found["errors"]["max"] else ""
        lines.append(
            f"  {path:5}  {rate['median']:8.0f} tokens/s ({rate['min']:.0f}-{rate['max']:.0f})  "
            f"TTFT +{first['median']:.1f} ms p50 ({first['min']:.1f}-{first['max']:.1f}), "
            f"+{found['ttft_overhead_p99_ms']['median']:.1f} p99  "
            f"TPOT +{rest['median']:.2f} p50, +{found['tpot_overhead_p99_ms']['median']:.2f} p99  "
            f"{found['items_per_second']['median']:.0f} items/s, {found['calls_per_second']['median']:.0f} calls/s"
            f"{against}{errors}"
        )
    return lines
