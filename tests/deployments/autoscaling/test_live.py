"""A real pool under Serve: none, one, two replicas and none again, while clients ask, and no request is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crowd import CLIENTS, TOKENS, Crowd, pool


def test_replicas_come_with_the_load_and_go_without_it(application: Callable[..., Any]) -> None:
    with application("tide", pools=[pool("tide", most=2)]) as probe:
        assert probe.loads.remote().result(timeout_s=60) == []
        with Crowd(probe) as crowd:
            probe.until_engines.remote(1).result(timeout_s=240)
            probe.until_engines.remote(2).result(timeout_s=240)
        probe.until_engines.remote(0).result(timeout_s=240)
        assert len(crowd.answers) >= CLIENTS
        assert set(crowd.answers) == {TOKENS}
