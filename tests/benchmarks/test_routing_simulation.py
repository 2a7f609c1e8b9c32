"""The simulator behind ``benchmarks.routing``: its engine keeps our scheduler's rules, its traces are what they say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.routing.blocks import Blocks
from benchmarks.routing.engine import Running, SimulatedEngine
from benchmarks.routing.hardware import A100, ERNIE_21B, ERNIE_300B, H20, kv_blocks, timing
from benchmarks.routing.policies import POLICIES
from benchmarks.routing.readers import read_azure, read_mooncake
from benchmarks.routing.simulator import Simulation
from benchmarks.routing.traces import LogNormal, Workload, name_block
from deployments.routing import Replica, Router, RoutingOptions
from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler

BLOCK = 4
SPEED = timing(ERNIE_21B, A100)


def spec(name: str = "a", **changes) -> Replica:
    made = Replica(name, "p", max_model_len=4096, block_size=64, total_blocks=2000, max_num_seqs=16,
                   max_num_batched_tokens=512)  # fmt: skip
    return replace(made, **changes)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 12), st.integers(0, 20)), max_size=12),
    st.integers(14, 30),
    st.sampled_from([4, 7, 16]),
)
def test_engine_equals_our_scheduler_step_by_step(asked, num_blocks, budget):
    """The same tokens of the same requests in every step, with chunks, prefix hits and preemptions."""
    pool = BlockPool(num_blocks, BLOCK)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=num_blocks * BLOCK)
    engine = SimulatedEngine(
        spec(block_size=BLOCK, total_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=budget), SPEED
    )
    engine._row = lambda: 1  # a step at a time
    asked = sorted(asked, key=lambda one: one[3])
    outputs: dict[str, int] = {}
    for step in range(400):
        while asked and asked[0][3] <= step:
            group, length, output, _ = asked.pop(0)
            name = str(len(outputs))
            ids = [group * 1000 + i for i in range(min(length, 12))] + [
                10**6 + int(name) * 1000 + i for i in range(length - 12)
            ]
            outputs[name] = output
            scheduler.add(Request.from_message(EngineRequest(name, ids, SamplingParams(), max_tokens=output)))
            whole = ids + [-1 - int(name)] * output
            names = []
            for i in range(len(whole) // BLOCK):
                names.append(repr(whole[: (i + 1) * BLOCK]).encode())
            engine.add(Running(length, output, names, name))
        parts = scheduler.schedule()
        expected = [(part.request.request_id, part.num_new_tokens, part.start) for part in parts]
        end = engine.begin(float(step))
        found = [(r.tag, new, r.computed) for r, new in engine._parts] if end is not None else []
        assert found == expected
        scheduler.update(parts, {p.request.request_id: -1 - int(p.request.request_id) for p in parts if p.samples})
        for part in parts:
            request = part.request
            if len(request.output_token_ids) >= outputs[request.request_id]:
                scheduler.finish(request)
        if end is not None:
            engine.end(float(step) + 0.5)
        load = engine.load()
        assert load.free_blocks == pool.num_free
        assert load.waiting_prefill_tokens == scheduler.num_prefill_tokens
        assert (load.waiting_requests, load.running_requests) == (scheduler.num_waiting, scheduler.num_running)
        if not asked and not scheduler.has_work:
            break
    assert not scheduler.has_work


def test_rows_of_decode_steps_equal_single_steps():
    """Simulating equal steps at once changes no time."""

    def times(single: bool) -> list[tuple[float, float]]:
        simulation = Simulation([POLICIES[0](seed=0)])
        simulation.add_replica(spec(), SPEED)
        if single:
            simulation.places["a"].engine._row = lambda: 1
        outcomes = simulation.run(trace(rate=4.0, seed=3))
        return [(one.ttft_s, one.e2e_s) for one in outcomes]

    for one, other in zip(times(True), times(False), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=2e-3)  # a cut is at the end of a step either way


def trace(*, rate: float, seed: int, seconds: float = 15.0):
    workload = Workload(
        LogNormal(200, 0.8, 8, 1500), LogNormal(60, 0.8, 2, 300), groups=4, system=LogNormal(256, 0.4, 64, 512),
        turns=2.0, most_prompt_tokens=2000,
    )  # fmt: skip
    return workload.generate(rate=rate, seconds=seconds, block_size=64, seed=seed)


@pytest.mark.parametrize("make", [*POLICIES, lambda seed: Router(RoutingOptions(admission=False), seed=seed)])
def test_every_request_ends_under_every_policy_and_blocks_come_back(make):
    simulation = Simulation([make(seed=0), make(seed=1)])
    for name in "abc":
        simulation.add_replica(spec(name), SPEED)
    outcomes = simulation.run(trace(rate=12.0, seed=1))
    assert outcomes
    assert all(one.e2e_s >= one.ttft_s > 0.0 for one in outcomes)
    for place in simulation.places.values():
        assert place.engine.blocks.num_free == place.engine.blocks.num_blocks
    assert all(getattr(ingress, "reserved", 0) == 0 for ingress in simulation.ingresses)


def test_replicas_come_and_go_while_it_runs():
    router = Router(RoutingOptions(admission=False), seed=0)
    simulation = Simulation([router])
    simulation.add_replica(spec("first"), SPEED)
    simulation.at(5.0, lambda: simulation.add_replica(spec("second"), SPEED))
    simulation.at(10.0, lambda: simulation.remove_replica("first"))
    turns: list[float] = []
    simulation.every(1.0, lambda now: turns.append(now.now))
    outcomes = simulation.run(trace(rate=6.0, seed=2, seconds=20.0))
    assert all(one.e2e_s > 0.0 for one in outcomes)
    for one in outcomes:
        assert one.choice is not None
        arrival = one.request.arrival_s
        assert one.choice.replica_id != "second" or arrival > 5.0
        assert one.choice.replica_id != "first" or arrival < 10.0
    assert set(simulation.places) == {"second"}
    assert len(turns) > 10


def test_ours_beats_round_robin_on_mixed_pools():
    workload = Workload(LogNormal(400, 0.8, 8, 4000), LogNormal(100, 0.6, 4, 400), groups=4, turns=2.0)
    requests = workload.generate(rate=7.0, seconds=25.0, block_size=64, seed=0)
    good = []
    for make in (POLICIES[0], lambda seed: Router(RoutingOptions(admission=True), seed=seed)):
        simulation = Simulation([make(seed=0)])
        for accelerator, ranks, budget in ((H20, 1, 512), (H20, 1, 512), (A100, 4, 2048)):
            simulation.add_replica(
                Replica(f"{accelerator.name}-{len(simulation.places)}", accelerator.name, 32768, 64,
                        kv_blocks(ERNIE_300B, accelerator, ranks=ranks, block_size=64), 128, budget),
                timing(ERNIE_300B, accelerator, ranks=ranks),
            )  # fmt: skip
        outcomes = simulation.run(requests)
        good.append(sum(one.ttft_s <= 2.0 and one.tpot_s <= 0.05 for one in outcomes) / len(outcomes))
    assert good[1] > 1.2 * good[0]


def test_generator_has_the_statistics_it_states():
    workload = Workload(LogNormal(500, 0.5), LogNormal(100, 0.5), groups=3, turns=2.0, burst=4.0)
    requests = workload.generate(rate=50.0, seconds=150.0, block_size=64, seed=0)
    assert len(requests) / 150.0 == pytest.approx(50.0, rel=0.15)
    assert requests == workload.generate(rate=50.0, seconds=150.0, block_size=64, seed=0)
    outputs = sorted(one.output_tokens for one in requests)
    assert outputs[len(outputs) // 2] == pytest.approx(100, rel=0.05)
    within = sum(one.arrival_s % 30.0 < 5.0 for one in Workload(
        LogNormal(500, 0.5), LogNormal(100, 0.5), burst=4.0
    ).generate(rate=50.0, seconds=150.0, block_size=64, seed=0))  # fmt: skip
    assert within / 7_500 == pytest.approx(4 / 9, rel=0.1)
    last = {}
    for one in requests:  # a later turn's prompt begins with all of the one before
        before = last.get(one.session)
        if before is not None:
            assert list(one.hashes[: len(before.hashes)]) == list(before.hashes)
            assert one.prompt_tokens > before.prompt_tokens + before.output_tokens
        last[one.session] = one


def test_azure_reader(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n2024-05-10 00:00:00.009930+00:00,1,0\n"
    )
    first, second, third = read_azure(path, block_size=64, speed=2.0)
    assert first.arrival_s == 0.0
    assert second.arrival_s == pytest.approx((50.995169 - 46.68059) / 2, abs=1e-5)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)
    assert third.output_tokens == 1
    assert not set(first.hashes) & set(second.hashes)
    path.write_text("TIMESTAMP,ContextTokens\nx,1\n")
    with pytest.raises(ValueError, match="line 2"):
        read_azure(path, block_size=64)


def test_mooncake_reader(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}\n'
        '{"timestamp": 3000, "input_length": 1600, "output_length": 26, "hash_ids": [46, 47, 49, 50]}\n'
    )
    first, second = read_mooncake(path, block_size=64)
    assert second.arrival_s == 3.0
    assert len(first.job.block_hashes[64]) == 1100 // 64
    shared = [a == b for a, b in zip(first.hashes, second.hashes, strict=False)]
    assert shared == [True] * 16 + [False] * 2
    with pytest.raises(ValueError, match="divide"):
        read_mooncake(path, block_size=48)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        read_mooncake(path, block_size=64)


def test_blocks_report_what_comes_and_goes():
    rng = random.Random(0)
    blocks = Blocks(20)
    engine = SimulatedEngine(spec(total_blocks=20, block_size=1), SPEED)
    engine.blocks = blocks
    findable: set[bytes] = set()
    held = []
    for i in range(300):
        if blocks.num_free >= 3 and rng.random() < 0.6:
            blocks.allocate(3)
            names = [name_block(rng.randrange(12), k) for k in range(3)]
            for name in names:
                blocks.publish(name)
            held.append(names)
        elif held:
            blocks.release(held.pop(rng.randrange(len(held))), 3, 3)
        new, gone = engine.changes()
        findable = (findable | set(new)) - set(gone)
        assert findable == set(blocks.held) | set(blocks.unheld), i
