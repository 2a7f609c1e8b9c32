"""For all tests."""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Whichever test imports Triton first decides: its interpreter runs the kernels on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

WITH_CLUSTERS = ("tests/chaos/", "tests/deployments/", "tests/images/")
"""Folders of tests that start servers and Ray clusters."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kills come last, when nothing else runs: engines that come back want all cores."""
    items.sort(key=lambda item: item.nodeid.startswith("tests/chaos/"))


class Scheduling(LoadScopeScheduling):
    """A file at a time for each process, but all tests with clusters in the same one, as they share a cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "clusters" if nodeid.startswith(WITH_CLUSTERS) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """For ``--numprocesses``; without it all tests run in this process."""
    return Scheduling(config, log)
