"""For all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Whichever test imports Triton first decides: its interpreter runs the kernels on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

HERE = Path(__file__).parent
WITH_CLUSTERS = ("chaos", "deployments", "images")
"""Folders of tests that start servers and Ray clusters: one at a time, beside all others."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Where tests run in several processes (``--dist loadgroup``), those with clusters stay in one of them."""
    if item.path.relative_to(HERE).parts[0] in WITH_CLUSTERS:
        item.add_marker(pytest.mark.xdist_group("cluster"))
