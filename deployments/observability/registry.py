"""Counters, gauges and histograms in plain Python: what the hot path writes and what every exporter reads.

A call costs some tenths of a microsecond, where one of ``ray.util.metrics`` costs 2.5 to 5 (2026-11-22, 2-core AMD EPYC
VM, Ray 2.60), so Ray gets their differences once a second (:mod:`deployments.observability.ray_export`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

Labels = tuple[str, ...]
"""The values of a metric's labels, in the order of their names."""

Kind = Literal["counter", "gauge", "histogram"]


class _Metric:
    kind: Kind

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help
        self.labels = tuple(labels)


class Counter(_Metric):
    """A total that only grows, for each combination of labels."""

    kind: Kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help, labels)
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels = (), amount: float = 1.0) -> None:
        """Count ``amount`` more."""
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def raise_to(self, labels: Labels, total: float) -> None:
        """Take over a total that is counted elsewhere; a smaller one is ignored."""
        if total >= self.values.get(labels, 0.0):
            self.values[labels] = total

    def forget(self, gone: Callable[[Labels], bool]) -> None:
        """Drop the series whose labels match."""
        for labels in [labels for labels in self.values if gone(labels)]:
            del self.values[labels]


class Gauge(_Metric):
    """A value that goes up and down, for each combination of labels."""

    kind: Kind = "gauge"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help, labels)
        self.values: dict[Labels, float] = {}

    def set(self, labels: Labels, value: float) -> None:
        """The value is this now."""
        self.values[labels] = value

    def forget(self, gone: Callable[[Labels], bool]) -> None:
        """Drop the series whose labels match."""
        for labels in [labels for labels in self.values if gone(labels)]:
            del self.values[labels]


class Distribution:
    """What a histogram has seen under one combination of labels."""

    __slots__ = ("counts", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        """Values in each bucket; the last one is for those beyond all bounds."""
        self.sum = 0.0


class Histogram(_Metric):
    """How many values fell into each bucket, for each combination of labels.

    Args:
        name: of the metric.
        help: what it is, in one line.
        labels: names of the labels.
        bounds: upper bounds of the buckets, ascending, inclusive.
    """

    kind: Kind = "histogram"

    def __init__(self, name: str, help: str, labels: Sequence[str] = (), *, bounds: Sequence[float]) -> None:
        super().__init__(name, help, labels)
        self.bounds = tuple(bounds)
        self.series: dict[Labels, Distribution] = {}
        self._taps: list[list[tuple[Labels, float]]] = []

    def observe(self, labels: Labels, value: float) -> None:
        """Count one value."""
        series = self.series.get(labels)
        if series is None:
            series = self.series[labels] = Distribution(len(self.bounds) + 1)
        series.counts[bisect_left(self.bounds, value)] += 1
        series.sum += value
        for tap in self._taps:
            tap.append((labels, value))

    def tap(self) -> list[tuple[Labels, float]]:
        """A list that gets every value from now on, for an exporter that takes nothing else; the caller empties it."""
        values: list[tuple[Labels, float]] = []
        self._taps.append(values)
        return values


Metric = Counter | Gauge | Histogram
_M = TypeVar("_M", Counter, Gauge, Histogram)


class Registry:
    """All metrics of one process, in the order in which they were made.

    Args:
        constant: labels that every series carries, such as the application.
    """

    def __init__(self, constant: dict[str, str] | None = None) -> None:
        self.constant = dict(constant or {})
        self._metrics: dict[str, Metric] = {}

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._metrics.values())

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        """Make a counter; its name ends in ``_total``."""
        return self._add(Counter(name, help, labels))

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        """Make a gauge."""
        return self._add(Gauge(name, help, labels))

    def histogram(self, name: str, help: str, labels: Sequence[str] = (), *, bounds: Sequence[float]) -> Histogram:
        """Make a histogram."""
        return self._add(Histogram(name, help, labels, bounds=bounds))

    def _add(self, metric: _M) -> _M:
        self._metrics[metric.name] = metric
        return metric
