"""``GET /state``, ``GET /metrics`` and the load of experts, without a browser."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from deployments.directory import EngineAddress
from deployments.observability.config import ObservabilityConfig
from deployments.observability.experts import AT_ONCE, REMEMBERED, ExpertLoads
from deployments.observability.metrics import Metrics
from deployments.observability.routes import observability_routes
from deployments.observability.seeing import Seeing, count_engines
from deployments.observability.state import FRESH_S, StateEncoder
from deployments.page import PAGE_PATHS
from deployments.routing import Rates, Replica
from engine.messages import EngineLoad


@dataclass
class Member:
    address: EngineAddress
    load: EngineLoad | None = None
    rates: Rates | None = None
    ready: bool = True
    retired: bool = False
    silent_s: float = 0.0


@dataclass
class Model:
    served_model_name: str = "tiny"
    max_model_len: int = 4096


@dataclass
class Cluster:
    members: list[Member] = field(default_factory=list)
    info: Model = field(default_factory=Model)
    held: int = 0

    def engines(self) -> list[Member]:
        return self.members


def address(replica_id: str, pool: str = "h20") -> EngineAddress:
    return EngineAddress(
        spec=Replica(replica_id, pool, 4096, 16, 100, 8, 256),
        model_path="/m",
        identity="0",
        actor_name=replica_id,
        namespace="n",
        stalled_after_s=60,
        start_seconds=1,
    )


def load(**values: Any) -> EngineLoad:
    base = {"waiting_requests": 1, "running_requests": 2, "waiting_prefill_tokens": 30, "free_blocks": 75}
    return EngineLoad(**{**base, "total_blocks": 100, "steps": 4, "step_seconds": 0.02, **values})


def client(cluster: Cluster, config: ObservabilityConfig | None = None, **options: Any) -> TestClient:
    routes = observability_routes(cluster, Metrics(), config or ObservabilityConfig(), **options)
    return TestClient(Starlette(routes=routes))


def test_state_has_every_engine_in_its_pool() -> None:
    rates = Rates(step=0.01, prefill=1e-4, decode=1e-3, context=0.0)
    cluster = Cluster(
        [
            Member(address("b"), load(decode_tokens=7), rates),
            Member(address("a"), retired=True, ready=False),
            Member(address("c", "a100"), ready=False, silent_s=float("inf")),
        ],
        held=3,
    )
    state = client(cluster, pools=("cpu", "h20")).get("/state").json()
    assert [pool["name"] for pool in state["pools"]] == ["cpu", "h20", "a100"]
    cpu, h20, a100 = (pool["replicas"] for pool in state["pools"])
    assert cpu == []
    assert [(replica["id"], replica["state"]) for replica in h20] == [("a", "draining"), ("b", "ready")]
    assert h20[1]["load"]["decode_tokens"] == 7
    assert h20[1]["load"]["free_blocks"] == 75
    assert h20[1]["rates"]["prefill_s"] == 1e-4
    assert h20[1]["max_num_seqs"] == 8
    assert "load" not in h20[0]
    assert a100[0]["state"] == "lost"
    assert state["model"] == {"name": "tiny", "max_model_len": 4096}
    assert state["held"] == 3
    assert "experts" not in state


def test_state_is_made_anew_only_when_it_has_aged() -> None:
    now = 100.0
    cluster = Cluster()
    encode = StateEncoder(cluster, clock=lambda: now)
    first = encode(experts=False)
    cluster.held = 1
    now += FRESH_S / 2
    assert encode(experts=False) == first
    now += FRESH_S
    assert json.loads(encode(experts=False))["held"] == 1


def test_metrics_are_what_prometheus_reads() -> None:
    response = client(Cluster([Member(address("a"), load())])).get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert "dibit_time_to_first_token_seconds" in names


@pytest.mark.parametrize(
    ("option", "paths"), [("metrics", ["/metrics"]), ("state", ["/state"]), ("page", list(PAGE_PATHS))]
)
def test_what_is_turned_off_is_not_there(option: str, paths: list[str]) -> None:
    on, off = client(Cluster()), client(Cluster(), ObservabilityConfig(**{option: False}))
    assert [on.get(path).status_code for path in paths] == [200] * len(paths)
    assert [off.get(path).status_code for path in paths] == [404] * len(paths)


def test_the_page_is_sent_with_a_strict_policy() -> None:
    headers = client(Cluster()).get("/").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


def test_engines_are_counted_by_state() -> None:
    metrics = Metrics()
    members = [Member(address("a")), Member(address("b"), retired=True), Member(address("c"), ready=False)]
    count_engines(Cluster(members, held=2), metrics)
    assert metrics.engines.values == {("h20", "ready"): 1, ("h20", "draining"): 1, ("h20", "lost"): 1}
    assert metrics.held.values == {(): 2}


class Counting:
    """Engines whose experts have had so many tokens, by replica id."""

    def __init__(self) -> None:
        self.tokens: dict[str, dict[int, list[int]] | None] = {}
        self.asked: list[str] = []

    async def __call__(self, engine: EngineAddress) -> dict[int, list[int]] | None:
        self.asked.append(engine.replica_id)
        if engine.replica_id not in self.tokens:
            raise ValueError("no such actor")
        return self.tokens[engine.replica_id]


def test_experts_are_summed_over_a_pool_and_keep_what_lost_engines_did() -> None:
    engines = Counting()
    loads = ExpertLoads(engines)
    engines.tokens = {"a": {1: [5, 1]}, "b": {1: [1, 1]}, "c": {1: [100, 0]}}
    both = [address("a"), address("b"), address("c", "a100")]
    asyncio.run(loads.poll(both))
    engines.tokens = {"a": {1: [6, 1]}, "b": {1: [1, 3]}, "c": {1: [100, 0]}}
    asyncio.run(loads.poll(both))
    assert loads.pools == {"h20": {1: [7, 4]}, "a100": {1: [100, 0]}}
    del engines.tokens["a"]
    asyncio.run(loads.poll(both))
    asyncio.run(loads.poll([address("b")]))
    assert loads.pools["h20"] == {1: [7, 4]}


def test_an_engine_that_was_lost_for_a_while_is_not_counted_twice() -> None:
    engines = Counting()
    loads = ExpertLoads(engines)
    engines.tokens = {"a": {1: [5, 1]}, **{f"r{i}": {1: [0, 0]} for i in range(2 * REMEMBERED)}}
    asyncio.run(loads.poll([address("a")]))
    asyncio.run(loads.poll([]))
    engines.tokens["a"] = {1: [7, 1]}
    asyncio.run(loads.poll([address("a")]))
    assert loads.pools == {"h20": {1: [7, 1]}}
    for i in range(2 * REMEMBERED):  # and of those that don't come back, little is kept
        asyncio.run(loads.poll([address(f"r{i}")]))
    assert len(loads._last) <= REMEMBERED + 1


def test_engines_that_count_nothing_are_asked_once() -> None:
    engines = Counting()
    engines.tokens = {"a": None}
    loads = ExpertLoads(engines)
    for _ in range(3):
        asyncio.run(loads.poll([address("a")]))
    assert engines.asked == ["a"]


def test_every_engine_gets_its_turn() -> None:
    engines = Counting()
    many = [address(f"r{i}") for i in range(3 * AT_ONCE)]
    engines.tokens = {engine.replica_id: {0: [1]} for engine in many}
    loads = ExpertLoads(engines)
    for _ in range(3):
        asyncio.run(loads.poll(many))
    assert sorted(engines.asked) == sorted(engine.replica_id for engine in many)


def test_an_ingress_keeps_its_numbers_fresh_until_it_closes() -> None:
    class Watched(Cluster):
        def engines(self) -> list[Member]:
            looked.set()
            return self.members

    async def run() -> tuple[dict[tuple[str, ...], float], bool]:
        seeing = Seeing(
            ObservabilityConfig(expert_load_period_s=3600), application="shop", ingress="i1", pools=("h20",)
        )
        source = Watched([Member(address("a"), ready=False)])
        seeing.start(source)
        for _ in range(2):  # the second time, the first has been done with
            looked.clear()
            await asyncio.wait_for(looked.wait(), timeout=30)
        await seeing.close()
        looked.clear()
        await asyncio.sleep(0)
        return seeing.metrics.engines.values, looked.is_set()

    looked = asyncio.Event()
    values, still_looks = asyncio.run(run())
    assert values == {("h20", "lost"): 1}
    assert not still_looks


def test_without_traces_nothing_stands_between_server_and_application() -> None:
    seeing = Seeing(ObservabilityConfig(), application="shop", ingress="i1")
    app = Starlette()
    assert seeing.around(app) is app
    assert seeing.observer is seeing.metrics
