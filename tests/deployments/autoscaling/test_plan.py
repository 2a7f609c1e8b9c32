"""What the plan does under loads whose right answer is known, and what it never does under any."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import Pool, options, run, stats

from deployments.autoscaling import Memory, PoolState, plan
from deployments.autoscaling.model import mean_speed
from deployments.autoscaling.state import MOST_DEMAND, Speed


def targets_of(pool: Pool) -> list[int]:
    return [target for _, target in pool.history]


@pytest.mark.parametrize(("load", "replicas"), [(0.5, 1), (1.0, 1), (2.3, 3), (7.6, 8)])
def test_a_steady_load_gets_what_it_needs_and_keeps_it(load: float, replicas: int) -> None:
    pool = Pool(options(min_replicas=1), target=1, start_s=30)
    run([pool], lambda now: load, seconds=1800)
    settled = [target for when, target in pool.history if when > 900]
    assert settled == []
    assert replicas <= pool.target <= math.ceil(load / 0.8) + 1


def test_the_first_replica_is_asked_for_at_once_when_requests_are_held() -> None:
    pool = Pool(options())
    run([pool], lambda now: 0.0 if now < 100 else 0.5, seconds=200)
    assert pool.history[0] == (100.0, 1)


def test_many_held_requests_ask_for_several() -> None:
    targets, _ = plan([PoolState(options(), 0, requests=350)], Memory(), now=0.0)
    assert targets == {"one": 4}


def test_the_last_replica_goes_when_nothing_was_asked_for_long_enough() -> None:
    pool = Pool(options(downscale_to_zero_delay_s=50), start_s=5)
    run([pool], lambda now: 0.5 if now < 100 else 0.0, seconds=200)
    assert targets_of(pool) == [1, 0]
    assert 150 <= pool.history[-1][0] <= 152


def test_a_replica_that_has_said_nothing_yet_is_not_idle() -> None:
    memory = Memory()
    for now in range(500):
        targets, memory = plan([PoolState(options(), 1, {"a": None})], memory, now=float(now))
    assert targets == {"one": 1}


def test_the_last_replica_stays_while_serve_knows_of_requests() -> None:
    """They may be on their way to an engine that has just come up and has nothing to do yet."""
    memory = Memory()
    for now in range(500):
        targets, memory = plan([PoolState(options(), 1, {"a": stats(0.0)}, requests=0.5)], memory, now=float(now))
    assert targets == {"one": 1}


def test_a_queue_grows_the_pool_though_what_is_served_needs_no_more() -> None:
    """What waits or is turned away is not seen in what is served."""
    full = stats(0.9, waiting_tokens=5000)
    memory = Memory()
    target = 2
    for now in range(60):
        pool = PoolState(options(), target, {"a": full, "b": full})
        targets, memory = plan([pool], memory, now=float(now))
        target = targets["one"]
    assert target == 4


def test_what_is_turned_away_counts_as_if_it_had_been_served() -> None:
    """Half a replica's worth is served, and three times as much refused: that makes two replicas' worth."""
    refusing = replace(stats(0.5), begun_tokens_per_s=100.0, refused_tokens_per_s=300.0)
    memory = Memory()
    for now in range(60):
        targets, memory = plan([PoolState(options(), 1, {"a": refusing})], memory, now=float(now))
    assert targets == {"one": 2}


@given(refused=st.floats(0, 1e6), begun=st.floats(0, 1e4))
def test_clients_that_come_again_and_again_do_not_count_without_end(refused: float, begun: float) -> None:
    load = replace(stats(0.5), begun_tokens_per_s=begun, refused_tokens_per_s=refused).load(16)
    assert load.prefill_tokens <= load.demand.prefill_tokens <= MOST_DEMAND * load.prefill_tokens


def test_more_requests_than_seats_are_answered_at_once() -> None:
    """As after a start from zero, when all that were held come to the first replica."""
    memory = Memory()
    for now in range(2):
        pool = PoolState(options(), 1, {"a": None}, requests=250)
        targets, memory = plan([pool], memory, now=float(now))
    assert targets == {"one": 3}


def test_a_new_replica_that_knows_little_of_its_speed_changes_little() -> None:
    known = stats(0.5, speed=Speed(0.01, 1e-3, 1e-3, 0.0, seen_s=100.0))
    new = stats(0.5, speed=Speed(0.05, 0.0, 0.0, 0.0, seen_s=1.0))
    mean = mean_speed([known, new])
    assert mean is not None
    assert mean.step == pytest.approx(0.01, rel=0.05)


def test_a_full_cache_grows_the_pool() -> None:
    full = replace(stats(0.1), free_blocks=20)
    memory = Memory()
    for now in range(60):
        targets, memory = plan([PoolState(options(), 1, {"a": full})], memory, now=float(now))
    assert targets == {"one": 2}


def test_a_load_that_rises_is_met_before_it_is_there() -> None:
    """Replicas take 5 minutes; the load doubles in 30. Asked for as it comes, each of three would be 5 minutes late."""
    pool = Pool(options(min_replicas=1, start_s=300), target=4, starting=[0.0] * 4, start_s=300)
    short = []

    def load(now: float) -> float:
        return 3.0 if now < 600 else min(3.0 + (now - 600) / 600, 6.0)

    def check(now: float, targets: object) -> None:
        if len(pool.names) < load(now):
            short.append(now)

    run([pool], load, seconds=3000, check=check)
    assert len(short) < 60


def test_the_time_to_start_is_learned() -> None:
    pool = Pool(options(min_replicas=1, start_s=60), start_s=200)
    memory = run([pool], lambda now: 2.5, seconds=1500)
    assert memory.pools["one"].start_s == pytest.approx(200, abs=2)


def test_the_cheaper_pool_grows_first_and_shrinks_last() -> None:
    cheap = Pool(options(pool="cheap", cost=1, max_replicas=3), start_s=20)
    dear = Pool(options(pool="dear", cost=4, max_replicas=5), start_s=20)
    run([dear, cheap], lambda now: 2.0 if now < 1000 else 4.5 if now < 2000 else 1.0, seconds=4000)
    before = [target for when, target in dear.history if when < 1000]
    assert before == []
    assert max(targets_of(dear)) >= 2
    assert max(targets_of(cheap)) == 3
    assert dear.target == 0
    assert cheap.target >= 1


def test_a_pool_that_cannot_start_is_not_waited_for() -> None:
    """No node comes for the cheaper pool; the other one takes over."""
    cheap = Pool(options(pool="cheap", cost=1, start_s=30), broken=True)
    dear = Pool(options(pool="dear", cost=4, min_replicas=1), target=1, start_s=30)
    run([cheap, dear], lambda now: 3.0, seconds=1200)
    assert len(dear.names) >= 3


def test_a_dear_pool_stays_until_the_cheaper_one_is_really_up() -> None:
    cheap = Pool(options(pool="cheap", cost=1), start_s=1500)
    dear = Pool(options(pool="dear", cost=4), target=3, starting=[0.0] * 3, start_s=20)
    short = []

    def check(now: float, targets: object) -> None:
        if now > 1 and len(cheap.names) + len(dear.names) < 2:
            short.append(now)

    run([cheap, dear], lambda now: 2.0, seconds=4000, check=check)
    assert short == []
    assert dear.target == 0


def test_a_replica_that_fails_is_no_reason_to_ask_for_another() -> None:
    memory = Memory()
    for now in range(400):
        alive = {"a": stats(0.7), "b": stats(0.7)}
        if now > 100:
            del alive["b"]
        targets, memory = plan([PoolState(options(), 2, alive)], memory, now=float(now))
    assert targets == {"one": 2}
    assert len(memory.pools["one"].asked) == 1


TICK_S = 4.0
LOADS = st.lists(st.floats(0, 12), min_size=1, max_size=40)


@settings(deadline=None, max_examples=25)
@given(loads=LOADS, hold_s=st.sampled_from([7, 30, 120]), start_s=st.sampled_from([5, 60, 200]), low=st.integers(0, 3))
def test_whatever_the_load_there_is_no_flapping(loads: list[float], hold_s: int, start_s: int, low: int) -> None:
    """Within bounds; never down sooner than the delay after up; never down to less than the load of the delay."""
    delay_s = 120.0
    pool = Pool(options(min_replicas=low, downscale_delay_s=delay_s), target=low, start_s=start_s)
    ups: list[float] = []
    seen: list[tuple[float, float]] = []

    def load(now: float) -> float:
        return loads[int(now // hold_s) % len(loads)]

    def check(now: float, targets: dict[str, int]) -> None:
        target = targets["one"]
        assert low <= target <= 10
        # What can be seen of a load are replicas that serve it.
        served = min(load(now), len(pool.names) * 1.25)
        seen.append((now, served))
        if target > pool.target:
            ups.append(now)
        elif target < pool.target:
            assert not ups or now - ups[-1] >= delay_s - TICK_S
            needed = max(value for when, value in seen if when > now - delay_s + TICK_S)
            assert target >= min(needed, 10)

    run([pool], load, seconds=1500, tick_s=TICK_S, check=check)


@settings(deadline=None, max_examples=15)
@given(period_s=st.integers(4, 110), low=st.floats(0.1, 2), high=st.floats(2, 8))
def test_a_load_that_flaps_faster_than_the_delay_settles(period_s: int, low: float, high: float) -> None:
    pool = Pool(options(min_replicas=1, downscale_delay_s=120), target=1, start_s=10)
    run([pool], lambda now: high if now % period_s < period_s / 2 else low, seconds=2400, tick_s=2.0)
    assert [entry for entry in pool.history if entry[0] > 1200] == []
