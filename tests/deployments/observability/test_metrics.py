"""Metrics: what is counted, in which words, and what an exporter reads of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from deployments.directory import EngineAddress
from deployments.observability import exposition
from deployments.observability.metrics import FORGET_AFTER_S, MAX_REASONS, Metrics
from deployments.observability.registry import Histogram, Registry
from deployments.routing import Replica
from engine.messages import EngineLoad, EngineRequest
from engine.sampling_params import SamplingParams
from tests.promql import selectors

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = ROOT / "deployments" / "observability" / "grafana" / "dibit.json"


def engine(pool: str = "h20", replica_id: str = "r1") -> EngineAddress:
    spec = Replica(replica_id, pool, 4096, 16, 100, 8, 256)
    return EngineAddress(
        spec=spec, model_path="/m", identity="0", actor_name="a", namespace="n", stalled_after_s=60, start_seconds=1
    )


def request(prompt: int = 5) -> EngineRequest:
    return EngineRequest("r", list(range(1, prompt + 1)), SamplingParams(), max_tokens=9)


def load(**values: Any) -> EngineLoad:
    base = {"waiting_requests": 1, "running_requests": 2, "waiting_prefill_tokens": 30, "free_blocks": 75}
    return EngineLoad(**{**base, "total_blocks": 100, "steps": 4, "step_seconds": 0.02, **values})


def scrape(registry: Registry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What Prometheus reads, by name and labels (without those that are the same everywhere)."""
    found = {}
    for family in text_string_to_metric_families(b"".join(exposition.render(registry)).decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in registry.constant}
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


class Scraped(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    def __init__(self, metrics: Metrics) -> None:
        metrics.collect()
        super().__init__(scrape(metrics.registry))

    def value(self, name: str, **labels: str) -> float:
        return self[f"dibit_{name}", frozenset(labels.items())]


def test_a_request_leaves_its_latencies_and_tokens() -> None:
    metrics = Metrics()
    metrics.routed(request(), engine(), predicted_ttft_s=0.2, cached_tokens=16)
    metrics.first_token(engine(), ttft_s=0.3, predicted_ttft_s=0.2, queued_s=0.05)
    metrics.finished(request(5), engine(), reason="stop", e2e_s=1.3, ttft_s=0.3, tokens=11)
    seen = Scraped(metrics)
    assert seen.value("time_to_first_token_seconds_sum", pool="h20") == pytest.approx(0.3)
    assert seen.value("time_to_first_token_seconds_bucket", pool="h20", le="0.25") == 0
    assert seen.value("time_to_first_token_seconds_bucket", pool="h20", le="0.5") == 1
    assert seen.value("time_per_output_token_seconds_sum", pool="h20") == pytest.approx(0.1)
    assert seen.value("e2e_request_latency_seconds_sum", pool="h20") == pytest.approx(1.3)
    assert seen.value("request_queue_time_seconds_sum", pool="h20") == pytest.approx(0.05)
    assert seen.value("prompt_tokens_total", pool="h20") == 5
    assert seen.value("generation_tokens_total", pool="h20") == 11
    assert seen.value("requests_finished_total", pool="h20", reason="stop") == 1
    assert seen.value("router_decisions_total", pool="h20", replica="r1") == 1
    assert seen.value("router_cached_tokens_total", pool="h20") == 16
    assert seen.value("router_prediction_error_seconds_sum", pool="h20") == pytest.approx(0.1)
    assert seen.value("router_predicted_ttft_seconds_total", pool="h20") == pytest.approx(0.2)


def test_a_request_without_tokens_has_no_time_per_token() -> None:
    metrics = Metrics()
    for tokens in (0, 1):
        metrics.finished(request(), engine(), reason="abort", e2e_s=1.0, ttft_s=1.0, tokens=tokens)
    assert not metrics.tpot.series
    assert Scraped(metrics).value("requests_finished_total", pool="h20", reason="abort") == 2


def test_a_load_becomes_gauges_and_totals() -> None:
    metrics = Metrics()
    metrics.loaded(engine(), load(preemptions=1, queried_tokens=50, cached_tokens=20))
    metrics.loaded(engine(), load(preemptions=3, queried_tokens=90, cached_tokens=40, busy_seconds=1.5, steps=9))
    seen = Scraped(metrics)
    at = {"pool": "h20", "replica": "r1"}
    assert seen.value("num_requests_running", **at) == 2
    assert seen.value("num_requests_waiting", **at) == 1
    assert seen.value("waiting_prefill_tokens", **at) == 30
    assert seen.value("kv_cache_usage_ratio", **at) == pytest.approx(0.25)
    assert seen.value("preemptions_total", **at) == 3
    assert seen.value("prefix_cache_queries_total", **at) == 90
    assert seen.value("prefix_cache_hits_total", **at) == 40
    assert seen.value("engine_steps_total", **at) == 9
    assert seen.value("engine_busy_seconds_total", **at) == 1.5


def test_a_step_is_sampled_once_however_often_somebody_looks() -> None:
    metrics = Metrics()
    metrics.loaded(engine(), load(steps=4))
    for _ in range(3):
        metrics.collect()
    assert Scraped(metrics).value("engine_step_seconds_count", pool="h20") == 1
    metrics.loaded(engine(), load(steps=5))
    assert Scraped(metrics).value("engine_step_seconds_count", pool="h20") == 2


def test_a_replica_that_is_silent_leaves_no_series() -> None:
    now = 0.0
    metrics = Metrics(clock=lambda: now)
    metrics.routed(request(), engine(), predicted_ttft_s=0.1, cached_tokens=0)
    metrics.loaded(engine(), load())
    metrics.loaded(engine(replica_id="r2"), load())
    now = FORGET_AFTER_S + 1
    metrics.loaded(engine(replica_id="r2"), load())
    metrics.collect()
    text = b"".join(exposition.render(metrics.registry)).decode()
    assert 'replica="r2"' in text
    assert 'replica="r1"' not in text


def test_reasons_are_bounded_whatever_comes() -> None:
    metrics = Metrics()
    for i in range(10 * MAX_REASONS):
        metrics.refused(f"reason-{i}")
    assert len(metrics.refused_requests.values) == MAX_REASONS + 1
    assert sum(metrics.refused_requests.values.values()) == 10 * MAX_REASONS


def test_engines_that_are_gone_count_as_none() -> None:
    metrics = Metrics()
    metrics.count_engines({("h20", "ready"): 2, ("h20", "lost"): 1})
    metrics.count_engines({("h20", "ready"): 3})
    assert metrics.engines.values == {("h20", "ready"): 3, ("h20", "lost"): 0}


def test_expert_imbalance_is_the_busiest_over_the_mean() -> None:
    metrics = Metrics()
    metrics.note_experts("h20", {3: [10, 10, 10, 10], 4: [40, 0, 0, 0]})
    seen = Scraped(metrics)
    assert seen.value("expert_imbalance_ratio", pool="h20", layer="3") == 1
    assert seen.value("expert_imbalance_ratio", pool="h20", layer="4") == 4
    assert [seen.value("expert_tokens_total", pool="h20", expert=str(i)) for i in range(4)] == [50, 10, 10, 10]


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(st.text(max_size=12), st.floats(0, 1e12), max_size=4),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=12),
)
def test_any_label_reaches_prometheus_as_it_is(values: dict[str, float], constant: str) -> None:
    registry = Registry({"application": constant})
    gauge = registry.gauge("dibit_g", "A \\ help\nof two lines.", ("pool",))
    expected = {}
    for label, value in values.items():
        if "\r" in label or not label.isprintable():
            continue  # the reference parser reads line by line, by any line end there is
        gauge.set((label,), value)
        expected["dibit_g", frozenset({("pool", label)})] = value
    if not constant.isprintable():
        return
    assert scrape(registry) == pytest.approx(expected)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 200), max_size=30))
def test_histograms_hold_every_value_once(values: list[float]) -> None:
    registry = Registry()
    histogram = registry.histogram("dibit_h_seconds", "h", bounds=(0.1, 1.0, 10.0))
    tap = histogram.tap()
    for value in values:
        histogram.observe((), value)
    seen = scrape(registry)
    if values:
        for bound in (0.1, 1.0, 10.0, math.inf):
            le = "+Inf" if bound == math.inf else repr(bound).removesuffix(".0")
            inside = sum(value <= bound for value in values)
            assert seen["dibit_h_seconds_bucket", frozenset({("le", le)})] == inside
        assert seen["dibit_h_seconds_sum", frozenset()] == pytest.approx(sum(values))
        assert seen["dibit_h_seconds_count", frozenset()] == len(values)
    assert [value for _, value in tap] == values


def series_names() -> dict[str, str]:
    """Every name that a query may use -> the metric it belongs to."""
    names = {}
    for metric in Metrics().registry:
        suffixes = ("_bucket", "_sum", "_count") if isinstance(metric, Histogram) else ("",)
        names |= {metric.name + suffix: metric.name for suffix in suffixes}
    return names


def test_names_follow_the_conventions_of_prometheus() -> None:
    for metric in Metrics().registry:
        assert re.fullmatch(r"dibit_[a-z][a-z0-9_]*", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert metric.help.endswith(".")


def asked_by_the_dashboard() -> Iterator[tuple[str, dict[str, str]]]:
    """Series and labels of all its queries, as Grafana sends them; ranges stand in for its variables."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            yield from selectors(target["expr"].replace("${metrics}", "dibit").replace("$__rate_interval", "1m"))


def test_the_dashboard_shows_every_metric_and_nothing_else() -> None:
    names = series_names()
    labels = {metric.name: {*metric.labels, "application", "le"} for metric in Metrics().registry}
    used = set()
    for name, asked in asked_by_the_dashboard():
        assert name in names
        assert set(asked) <= labels[names[name]], name
        assert asked["application"] == "$application"
        used.add(names[name])
    assert used == set(names.values())


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "metrics", "application", "pool"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells


def test_the_documentation_lists_every_metric() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `(dibit_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", text, re.M)}
    expected = {metric.name: (metric.kind, ", ".join(metric.labels), metric.help) for metric in Metrics().registry}
    assert rows == expected
