"""What Dibit counts: the metrics by name, and the observer that fills them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deployments.directory import EngineAddress
from deployments.observability.registry import Histogram, Labels, Registry
from deployments.observer import Observer
from engine.messages import EngineLoad, EngineRequest

LATENCIES = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
TOKEN_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
ERRORS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)
"""Upper bounds of buckets, in seconds and in tokens. Few, because each is a series for each pool and ingress."""

MAX_REASONS = 24
"""Words that a ``reason`` label may take; later ones become ``other``, whatever calls us."""

FORGET_AFTER_S = 60.0
"""Silence after which a replica's series go. An idle engine is heard every second."""

REPLICA = ("pool", "replica")


@dataclass(slots=True)
class _Heard:
    engine: EngineAddress
    load: EngineLoad
    at: float
    sampled_steps: int = -1


class Metrics(Observer):
    """Counts in plain Python what the client of the engines sees of them.

    A step's load is only remembered; :meth:`collect` turns the last one of each engine into series, when somebody is
    about to read them. Labels are few: pool and replica for what an engine reports, pool alone for histograms.

    Args:
        application: Serve's name of the application, on every series.
        ingress: name of this ingress process, on every series: each has its own counters.
        clock: seconds, monotonic.
    """

    def __init__(
        self, *, application: str = "dibit", ingress: str = "local", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = registry = Registry({"application": application, "ingress": ingress})
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._reasons: set[str] = set()

        pool = ("pool",)
        self.ttft = registry.histogram(
            "dibit_time_to_first_token_seconds",
            "Time from giving a request to the engines to its first token.",
            pool,
            bounds=LATENCIES,
        )
        self.tpot = registry.histogram(
            "dibit_time_per_output_token_seconds",
            "Mean time between the output tokens of a request, the first one aside.",
            pool,
            bounds=TOKEN_LATENCIES,
        )
        self.e2e = registry.histogram(
            "dibit_e2e_request_latency_seconds", "Time from giving a request to its end.", pool, bounds=LATENCIES
        )
        self.queue_time = registry.histogram(
            "dibit_request_queue_time_seconds",
            "Time that a request waited in its engine until it was first scheduled.",
            pool,
            bounds=LATENCIES,
        )
        self.request_prompt_tokens = registry.histogram(
            "dibit_request_prompt_tokens", "Prompt tokens of a finished request.", pool, bounds=TOKENS
        )
        self.request_generation_tokens = registry.histogram(
            "dibit_request_generation_tokens", "Output tokens of a finished request.", pool, bounds=TOKENS
        )
        self.finished_requests = registry.counter(
            "dibit_requests_finished_total",
            "Requests that have ended, by finish reason: stop, length, abort, error.",
            ("pool", "reason"),
        )
        self.prompt_tokens = registry.counter("dibit_prompt_tokens_total", "Prompt tokens of finished requests.", pool)
        self.generation_tokens = registry.counter(
            "dibit_generation_tokens_total", "Output tokens of finished requests.", pool
        )
        self.refused_requests = registry.counter(
            "dibit_requests_refused_total", "Requests turned away, by reason.", ("reason",)
        )
        self.unknown_fields = registry.counter(
            "dibit_ignored_fields_total", "Fields of request bodies that nobody here knows."
        )
        self.decisions = registry.counter(
            "dibit_router_decisions_total", "Requests that the router gave to a replica.", REPLICA
        )
        self.predicted_cached = registry.counter(
            "dibit_router_cached_tokens_total",
            "Prompt tokens that the router expected to find in the prefix cache of its choice.",
            pool,
        )
        self.predicted_ttft = registry.counter(
            "dibit_router_predicted_ttft_seconds_total",
            "Sum of predicted times to first token, of requests whose first token has come.",
            pool,
        )
        self.actual_ttft = registry.counter(
            "dibit_router_actual_ttft_seconds_total",
            "Sum of the actual times to first token of the same requests.",
            pool,
        )
        self.prediction_error = registry.histogram(
            "dibit_router_prediction_error_seconds",
            "Distance between predicted and actual time to first token.",
            pool,
            bounds=ERRORS,
        )
        self.failovers = registry.counter(
            "dibit_failovers_total", "Times that a request went on elsewhere because its engine was lost.", pool
        )
        self.running = registry.gauge("dibit_num_requests_running", "Requests in the engine's batch.", REPLICA)
        self.waiting = registry.gauge("dibit_num_requests_waiting", "Requests that wait for the engine.", REPLICA)
        self.waiting_prefill = registry.gauge(
            "dibit_waiting_prefill_tokens", "Prompt tokens that the engine has yet to compute.", REPLICA
        )
        self.kv_usage = registry.gauge(
            "dibit_kv_cache_usage_ratio", "Share of KV cache blocks that requests hold, 0 to 1.", REPLICA
        )
        self.kv_blocks = registry.gauge("dibit_kv_cache_blocks", "KV cache blocks of the engine.", REPLICA)
        self.step_seconds = registry.histogram(
            "dibit_engine_step_seconds", "Time of a step: a sample, one a second from each engine.", pool,
            bounds=TOKEN_LATENCIES,
        )  # fmt: skip
        self.engines = registry.gauge(
            "dibit_engines", "Engines known, by state: ready, draining, lost.", ("pool", "state")
        )
        self.held = registry.gauge(
            "dibit_requests_held", "Requests that wait at this ingress for an engine to come up."
        )
        self.totals = {
            name: registry.counter(f"dibit_{metric}_total", help, REPLICA)
            for name, metric, help in (
                ("steps", "engine_steps", "Steps of the engine."),
                ("busy_seconds", "engine_busy_seconds", "Time that the engine spent in steps."),
                ("prefill_tokens", "engine_prefill_tokens", "Prompt tokens computed, recomputed ones included."),
                ("decode_tokens", "engine_decode_tokens", "Tokens sampled."),
                ("preemptions", "preemptions", "Requests whose blocks were taken for others; they are recomputed."),
                ("queried_tokens", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
                ("cached_tokens", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
            )
        }
        """By the field of :class:`EngineLoad` that has the total."""
        self.expert_tokens = registry.counter(
            "dibit_expert_tokens_total",
            "Tokens routed to an expert, over all layers and the replicas of the pool.",
            ("pool", "expert"),
        )
        self.expert_imbalance = registry.gauge(
            "dibit_expert_imbalance_ratio",
            "Tokens of a layer's busiest expert over those of the mean expert, since the start.",
            ("pool", "layer"),
        )

    # What the client calls, on the hot path.

    def routed(
        self, request: EngineRequest, engine: EngineAddress, *, predicted_ttft_s: float, cached_tokens: int
    ) -> None:
        """Count the decision."""
        self.decisions.add((engine.pool, engine.replica_id))
        if cached_tokens:
            self.predicted_cached.add((engine.pool,), cached_tokens)

    def refused(self, reason: str) -> None:
        """Count it under its reason, as long as there are not too many of those."""
        if reason not in self._reasons:
            if len(self._reasons) >= MAX_REASONS:
                reason = "other"
            self._reasons.add(reason)
        self.refused_requests.add((reason,))

    def first_token(self, engine: EngineAddress, *, ttft_s: float, predicted_ttft_s: float, queued_s: float) -> None:
        """Note the latency and how far off the prediction was."""
        pool = (engine.pool,)
        self.ttft.observe(pool, ttft_s)
        self.queue_time.observe(pool, queued_s)
        self.prediction_error.observe(pool, abs(ttft_s - predicted_ttft_s))
        self.predicted_ttft.add(pool, predicted_ttft_s)
        self.actual_ttft.add(pool, ttft_s)

    def finished(
        self, request: EngineRequest, engine: EngineAddress, *, reason: str, e2e_s: float, ttft_s: float, tokens: int
    ) -> None:
        """Note latency and tokens; a request that ended before its first token has no time per token."""
        pool = (engine.pool,)
        self.finished_requests.add((engine.pool, reason))
        self.e2e.observe(pool, e2e_s)
        if tokens > 1:
            self.tpot.observe(pool, max(0.0, e2e_s - ttft_s) / (tokens - 1))
        self.prompt_tokens.add(pool, len(request.prompt_token_ids))
        self.generation_tokens.add(pool, tokens)
        self.request_prompt_tokens.observe(pool, len(request.prompt_token_ids))
        self.request_generation_tokens.observe(pool, tokens)

    def failed_over(self, engine: EngineAddress) -> None:
        """Count it."""
        self.failovers.add((engine.pool,))

    def loaded(self, engine: EngineAddress, load: EngineLoad) -> None:
        """Remember the load until :meth:`collect`."""
        heard = self._heard.get(engine.replica_id)
        if heard is None:
            self._heard[engine.replica_id] = _Heard(engine, load, self._clock())
        else:
            heard.load = load
            heard.at = self._clock()

    def ignored_fields(self, count: int) -> None:
        """Count them."""
        self.unknown_fields.add((), count)

    # What is done once a second, or when somebody looks.

    def collect(self) -> None:
        """Bring the engines' series up to the last load heard of each, and drop those of engines long silent."""
        now = self._clock()
        for replica_id, heard in list(self._heard.items()):
            labels = (heard.engine.pool, replica_id)
            if now - heard.at > FORGET_AFTER_S:
                del self._heard[replica_id]
                self._forget(labels)
            else:
                self._fold(labels, heard)

    def count_engines(self, states: Mapping[tuple[str, str], int]) -> None:
        """How many engines there are, by pool and state; a combination that isn't named any more is 0."""
        for labels in self.engines.values:
            self.engines.set(labels, 0)
        for labels, count in states.items():
            self.engines.set(labels, count)

    def note_experts(self, pool: str, layers: Mapping[int, Sequence[int]]) -> None:
        """Take over the tokens of each expert of a pool, by layer, summed over its replicas."""
        for expert, tokens in enumerate(_columns(layers.values())):
            self.expert_tokens.raise_to((pool, str(expert)), tokens)
        for layer, counts in layers.items():
            if total := sum(counts):
                self.expert_imbalance.set((pool, str(layer)), max(counts) * len(counts) / total)

    def _fold(self, labels: Labels, heard: _Heard) -> None:
        load = heard.load
        self.running.set(labels, load.running_requests)
        self.waiting.set(labels, load.waiting_requests)
        self.waiting_prefill.set(labels, load.waiting_prefill_tokens)
        self.kv_usage.set(labels, 1 - load.free_blocks / load.total_blocks if load.total_blocks else 0.0)
        self.kv_blocks.set(labels, load.total_blocks)
        for field, counter in self.totals.items():
            counter.raise_to(labels, getattr(load, field))
        if load.steps > max(heard.sampled_steps, 0):
            heard.sampled_steps = load.steps
            self.step_seconds.observe(labels[:1], load.step_seconds)

    def _forget(self, gone: Labels) -> None:
        for metric in self.registry:
            if metric.labels == REPLICA and not isinstance(metric, Histogram):
                metric.forget(gone.__eq__)


def _columns(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]
