"""What Ray's exporter shows of our metrics, scraped from a real cluster."""

from __future__ import annotations

import time

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families

from deployments.observability.metrics import Metrics
from deployments.observability.ray_export import RayExport


def scrape(url: str, name: str) -> dict[str, float]:
    """The samples whose name begins so, once there are any: Ray collects every few seconds."""
    deadline = time.monotonic() + 60
    while True:
        text = httpx.get(url).text
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(name) and sample.labels.get("application") == "shop"
            and sample.labels.get("le") in (None, "0.5")
        }  # fmt: skip
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)  # nothing tells of a collection


def test_ray_shows_the_same_numbers(ray_cluster: str) -> None:
    class Process:
        """An ingress process, as far as its metrics go; in here, so that Ray carries it there by value."""

        def __init__(self) -> None:
            self.metrics = Metrics(application="shop", ingress="i1")
            self.export = RayExport(self.metrics.registry)

        def work(self) -> list[int]:
            self.metrics.refused("overloaded")
            self.metrics.failovers.add(("h20",), 2)
            self.metrics.running.set(("h20", "r1"), 7)
            self.metrics.ttft.observe(("h20",), 0.3)
            first = sum(self.export.flush())
            self.metrics.refused("overloaded")
            self.metrics.running.forget(lambda labels: True)
            return [first, sum(self.export.flush()), sum(self.export.flush())]

    process = ray.remote(num_cpus=0)(Process).remote()
    first, second, third = ray.get(process.work.remote(), timeout=60)
    assert (first, second, third) == (4, 2, 0)  # only what has changed costs a call
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    assert scrape(url, "ray_dibit_requests_refused") == {"ray_dibit_requests_refused_total": 2}
    assert scrape(url, "ray_dibit_failovers") == {"ray_dibit_failovers_total": 2}
    assert scrape(url, "ray_dibit_num_requests_running") == {"ray_dibit_num_requests_running": 0}
    histogram = scrape(url, "ray_dibit_time_to_first_token_seconds")
    assert histogram["ray_dibit_time_to_first_token_seconds_bucket"] == 1
    assert histogram["ray_dibit_time_to_first_token_seconds_count"] == 1
    assert 0.25 <= histogram["ray_dibit_time_to_first_token_seconds_sum"] <= 0.5
