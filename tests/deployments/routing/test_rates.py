"""Rates are learned from the differences of loads, however many steps lie between them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.routing.rates import GUESS, PoolRates, Rates, ReplicaRates
from engine.messages import EngineLoad

TRUE = Rates(step=0.012, prefill=3e-4, decode=2e-4, context=2e-7)


class Engine:
    """Steps of random make-up that take what the rates say."""

    def __init__(self, rates: Rates, *, seed: int, noise: float = 0.0) -> None:
        self.rates, self.noise, self.rng = rates, noise, random.Random(seed)
        self.totals = [0, 0, 0, 0]
        self.busy = 0.0

    def step(self) -> None:
        running = self.rng.randrange(1, 64)
        parts = (1, self.rng.choice((0, 0, 100, 500, 2000)), running, running * self.rng.randrange(100, 4000))
        rates = (self.rates.step, self.rates.prefill, self.rates.decode, self.rates.context)
        self.totals = [total + part for total, part in zip(self.totals, parts, strict=True)]
        seconds = sum(part * rate for part, rate in zip(parts, rates, strict=True))
        self.busy += seconds * self.rng.uniform(1 - self.noise, 1 + self.noise)

    def load(self) -> EngineLoad:
        steps, prefill, decode, context = self.totals
        return EngineLoad(
            waiting_requests=0, running_requests=1, waiting_prefill_tokens=0, free_blocks=1, total_blocks=1,
            steps=steps, step_seconds=0.0, busy_seconds=self.busy, prefill_tokens=prefill, decode_tokens=decode,
            context_tokens=context,
        )  # fmt: skip


def seconds(rates: Rates, prefill: int, decode: int, context: int) -> float:
    return rates.step + rates.prefill * prefill + rates.decode * decode + rates.context * context


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_rates_converge_from_merged_differences(seed, most_merged):
    engine, pool = Engine(TRUE, seed=seed, noise=0.05), PoolRates()
    learner = ReplicaRates(pool, forget_s=60.0)
    rng = random.Random(seed)
    for _ in range(400):
        for _ in range(rng.randint(1, most_merged)):
            engine.step()
        learner.observe(engine.load())
    for kind in ((0, 1, 1000), (0, 64, 100_000), (1000, 8, 10_000), (2000, 32, 50_000)):
        assert seconds(learner.rates, *kind) == pytest.approx(seconds(TRUE, *kind), rel=0.2)
    assert learner.rates.prefill == pytest.approx(TRUE.prefill, rel=0.1)


def test_new_replica_starts_with_its_pools_rates():
    engine, pool = Engine(TRUE, seed=1), PoolRates()
    first = ReplicaRates(pool, forget_s=60.0)
    assert first.rates == GUESS
    for _ in range(300):
        engine.step()
        first.observe(engine.load())
    second = ReplicaRates(pool, forget_s=60.0)
    assert seconds(second.rates, 1000, 32, 50_000) == pytest.approx(seconds(TRUE, 1000, 32, 50_000), rel=0.1)


def test_change_of_speed_is_followed():
    engine, learner = Engine(TRUE, seed=2), ReplicaRates(PoolRates(), forget_s=10.0)
    for speed in (1.0, 2.0):
        engine.rates = Rates(*(speed * rate for rate in (TRUE.step, TRUE.prefill, TRUE.decode, TRUE.context)))
        for _ in range(300):
            engine.step()
            learner.observe(engine.load())
    assert seconds(learner.rates, 1000, 32, 50_000) == pytest.approx(2 * seconds(TRUE, 1000, 32, 50_000), rel=0.1)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_rates_are_never_negative(seed):
    engine, learner = Engine(Rates(0.0, 1e-4, 0.0, 0.0), seed=seed, noise=0.9), ReplicaRates(PoolRates(), forget_s=5.0)
    for _ in range(30):
        engine.step()
        learner.observe(engine.load())
        rates = learner.rates
        assert min(rates.step, rates.prefill, rates.decode, rates.context) >= 0.0


def test_restarted_engine_is_no_evidence():
    learner = ReplicaRates(PoolRates(), forget_s=60.0)
    old, new = Engine(TRUE, seed=1), Engine(TRUE, seed=2)
    for _ in range(50):
        old.step()
    learner.observe(old.load())
    seen = learner.rates.seen
    new.step()
    assert not learner.observe(new.load())
    assert learner.rates.seen == seen
