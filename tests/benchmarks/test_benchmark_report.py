"""The arithmetic under every benchmark result."""

from __future__ import annotations

import json

import pytest

from benchmarks import report


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (1, 1.0), (50, 50.0), (99, 99.0), (99.5, 100.0), (100, 100.0)]
)
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert report.percentile([float(value) for value in range(100, 0, -1)], percent) == expected


def test_spread() -> None:
    assert report.spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert report.spread([1.0, 2.0]) == {"min": 1.0, "median": 1.5, "max": 2.0}


def test_a_result_says_where_it_comes_from() -> None:
    found = report.context(["torch"])
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]
    assert found["versions"].keys() == {"python", "torch"}
    json.dumps(found)
