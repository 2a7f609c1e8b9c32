"""The metrics through Ray's exporter, under ``ray_`` and their names, for Ray's dashboard and its Prometheus.

Counts and buckets are exact there; Ray 2.60 takes each value of a histogram's sum for the middle of its bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray.util import metrics as ray_metrics

from deployments.observability.registry import Counter, Gauge, Histogram, Labels, Metric, Registry

MAX_OBSERVATIONS = 5_000
"""Values of one histogram between two flushes that are passed on; the rest would hold up the event loop."""


class RayExport:
    """Brings Ray's metrics up to a registry. Each process that flushes gets series of its own from Ray (``WorkerId``).

    Args:
        registry: what to export; metrics made later are left out.
    """

    def __init__(self, registry: Registry) -> None:
        self._mirrors = [_mirror(metric, registry.constant) for metric in registry]

    def flush(self) -> Iterator[int]:
        """Pass on what is new; yields after each metric the calls made for it, where an event loop may take a turn."""
        for mirror in self._mirrors:
            yield mirror.flush()


class _CounterMirror:
    def __init__(self, metric: Counter, constant: dict[str, str]) -> None:
        self._metric = metric
        self._ray = _made(ray_metrics.Counter, metric, constant)
        self._sent: dict[Labels, float] = {}

    def flush(self) -> int:
        calls = 0
        values = self._metric.values
        for labels, total in values.items():
            if (new := total - self._sent.get(labels, 0.0)) > 0:
                self._ray.inc(new, _tags(self._metric, labels))
                self._sent[labels] = total
                calls += 1
        if len(self._sent) > len(values):  # of replicas that are gone
            self._sent = {labels: total for labels, total in self._sent.items() if labels in values}
        return calls


class _GaugeMirror:
    def __init__(self, metric: Gauge, constant: dict[str, str]) -> None:
        self._metric = metric
        self._ray = _made(ray_metrics.Gauge, metric, constant)
        self._sent: dict[Labels, float] = {}

    def flush(self) -> int:
        calls = 0
        values = self._metric.values
        # Ray keeps a gauge's last value for as long as the process lives, so one that is gone ends at zero.
        for labels, value in [*values.items(), *((gone, 0.0) for gone in self._sent.keys() - values.keys())]:
            if self._sent.get(labels) != value:
                self._ray.set(value, _tags(self._metric, labels))
                calls += 1
        self._sent = dict(values)
        return calls


class _HistogramMirror:
    def __init__(self, metric: Histogram, constant: dict[str, str]) -> None:
        self._metric = metric
        self._ray = _made(ray_metrics.Histogram, metric, constant, boundaries=list(metric.bounds))
        self._new = metric.tap()

    def flush(self) -> int:
        new = self._new[:MAX_OBSERVATIONS]
        self._new.clear()
        for labels, value in new:
            self._ray.observe(value, _tags(self._metric, labels))
        return len(new)


def _mirror(metric: Metric, constant: dict[str, str]) -> _CounterMirror | _GaugeMirror | _HistogramMirror:
    match metric:
        case Counter():
            return _CounterMirror(metric, constant)
        case Gauge():
            return _GaugeMirror(metric, constant)
        case Histogram():
            return _HistogramMirror(metric, constant)


def _made(kind: Any, metric: Metric, constant: dict[str, str], **options: Any) -> Any:
    made = kind(metric.name, metric.help, tag_keys=(*constant, *metric.labels), **options)
    made.set_default_tags(constant)
    return made


def _tags(metric: Metric, labels: Labels) -> dict[str, str]:
    return dict(zip(metric.labels, labels, strict=True))
