"""The scheduler and its pool as a state machine: whatever happens in whatever order, the books are right."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_simulation import VOCAB_SIZE, Simulation

tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=10)
STEMS = [[0] * 30, [1, 2, 0] * 10, [1, 2, 0, 0, 1, 2, 2, 1] * 4]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 14),
        block_size=st.integers(1, 5),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 24),
        max_model_len=st.integers(20, 60),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        enable_chunked_prefill=st.sampled_from([True, True, False]),
        max_prompt_rows=st.integers(1, 12),
    )
    def start(self, **options: int | bool) -> None:
        self.simulation = Simulation(**options)  # type: ignore[arg-type]

    @rule(
        stem=st.sampled_from(STEMS),
        shared=st.integers(0, 20),
        tail=tokens,
        max_tokens=st.integers(1, 16),
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        given=st.sampled_from([0, 0, 1, 5]),
        prompt_logprobs=st.sampled_from([False, False, True]),
    )
    def add(self, stem: list[int], shared: int, tail: list[int], max_tokens: int, **options: int | bool) -> None:
        self.simulation.add(stem[:shared] + tail or [0], max_tokens, **options)  # type: ignore[arg-type]

    @rule(stem=st.sampled_from(STEMS), length=st.integers(1, 20), priority=st.sampled_from([0, 1]))
    def add_held(self, stem: list[int], length: int, priority: int) -> None:
        self.simulation.add(stem[:length], 3, priority=priority, held=True)

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.simulation.release(data.draw(st.sampled_from(sorted(self.simulation.live))))

    @rule(stem=st.sampled_from(STEMS), length=st.integers(1, 16), copies=st.integers(2, 4))
    def add_copies(self, stem: list[int], length: int, copies: int) -> None:
        for max_tokens in range(1, copies + 1):
            self.simulation.add(stem[:length], max_tokens * 3)

    @rule()
    def step(self) -> None:
        self.simulation.step()

    @rule(count=st.integers(2, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()
            self.simulation.check()

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.abort(data.draw(st.sampled_from(sorted(self.simulation.live))))

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def abort_during_a_step(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.simulation.live)))
        self.simulation.step(before_update=lambda: self.simulation.abort(request_id))

    @rule(request_id=st.sampled_from(["r0", "r1", "never seen"]))
    def abort_perhaps_unknown(self, request_id: str) -> None:
        self.simulation.abort(request_id)

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("enable_chunked_prefill", [True, False])
def test_the_simulation_reaches_what_it_is_for(enable_prefix_caching: bool, enable_chunked_prefill: bool) -> None:
    """A long seeded run under pressure preempts, hits and merges often, and everything still finishes."""
    draw = random.Random(7)
    simulation = Simulation(
        num_blocks=20,
        block_size=4,
        max_num_seqs=6,
        max_num_batched_tokens=28,
        max_model_len=64,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
    )
    for _ in range(400):
        for _ in range(draw.choice([0, 0, 0, 0, 2])):
            tail = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(6))]
            prompt = draw.choice(STEMS)[: draw.randrange(1, 20)] + tail
            simulation.add(prompt, draw.randrange(1, 30), priority=draw.choice([0, 0, 1]))
        simulation.step()
        simulation.check()
    simulation.drain()
    assert simulation.num_finished == simulation.num_added > 50
    assert simulation.num_preemptions > 20
    if enable_prefix_caching:
        assert simulation.num_prefix_hits > 50
        assert simulation.num_merged_blocks > 5
    else:
        assert simulation.num_prefix_hits == simulation.num_merged_blocks == 0
