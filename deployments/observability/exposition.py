"""The Prometheus text format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from deployments.observability.registry import Histogram, Registry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(registry: Registry) -> Iterator[bytes]:
    """All series of a registry, one metric at a time: where there are a thousand engines, that takes a while."""
    constant = list(registry.constant.items())
    for metric in registry:
        help = metric.help.replace("\\", r"\\").replace("\n", r"\n")
        lines = [f"# HELP {metric.name} {help}", f"# TYPE {metric.name} {metric.kind}"]
        if isinstance(metric, Histogram):
            lines += _histogram(metric, constant)
        else:
            for values, value in metric.values.items():
                labels = _labels([*constant, *zip(metric.labels, values, strict=True)])
                lines.append(f"{metric.name}{labels} {_number(value)}")
        yield "\n".join([*lines, ""]).encode()


def _histogram(metric: Histogram, constant: list[tuple[str, str]]) -> Iterable[str]:
    bounds = [*map(_number, metric.bounds), "+Inf"]
    for values, series in metric.series.items():
        labels = [*constant, *zip(metric.labels, values, strict=True)]
        total = 0
        for bound, count in zip(bounds, series.counts, strict=True):
            total += count
            yield f"{metric.name}_bucket{_labels([*labels, ('le', bound)])} {total}"
        yield f"{metric.name}_sum{_labels(labels)} {_number(series.sum)}"
        yield f"{metric.name}_count{_labels(labels)} {total}"


def _labels(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in pairs) + "}" if pairs else ""


@lru_cache(maxsize=10_000)
def _escape(value: str) -> str:
    # A lone surrogate has no UTF-8 form, and one bad label must not cost the whole page.
    value = value.encode("utf-8", "replace").decode()
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
