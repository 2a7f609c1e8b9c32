"""What the router must never do, whatever happens, and what it must prefer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.routing import Job, Replica, Router, RoutingOptions
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.messages import EngineLoad

BLOCK = 16
FREE = RoutingOptions(admission=False)


def replica(
    name: str, *, pool: str = "p", max_model_len: int = 4096, total_blocks: int = 1000, seats: int = 8
) -> Replica:
    return Replica(name, pool, max_model_len, BLOCK, total_blocks, seats, 512)


def load(
    steps: int = 0, *, waiting: int = 0, running: int = 0, prefill: int = 0, free: int = 1000, per_step: float = 0.02
) -> EngineLoad:
    return EngineLoad(
        waiting_requests=waiting, running_requests=running, waiting_prefill_tokens=prefill, free_blocks=free,
        total_blocks=1000, steps=steps, step_seconds=per_step, busy_seconds=per_step * steps,
        decode_tokens=running * steps, context_tokens=500 * running * steps,
    )  # fmt: skip


def chain(name: int, blocks: int) -> list[bytes]:
    return [(name << 32 | i).to_bytes(16, "little") for i in range(blocks)]


def job(tokens: int = 100, *, hashes: list[bytes] | None = None, **kwargs) -> Job:
    return Job(tokens, kwargs.pop("max_tokens", 50), {BLOCK: hashes or []}, **kwargs)


acts = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5), st.integers(1, 80)),
        st.tuples(st.just("remove"), st.integers(0, 5)),
        st.tuples(st.just("observe"), st.integers(0, 5), st.integers(0, 3), st.integers(0, 20), st.integers(0, 5000)),
        st.tuples(st.just("choose"), st.integers(1, 1200), st.integers(1, 200), st.integers(0, 3)),
        st.tuples(st.just("first"), st.integers(0, 30)),
        st.tuples(st.just("finish"), st.integers(0, 30), st.integers(0, 100)),
    ),
    max_size=60,
)


def play(script, *, seed: int, admission: bool) -> tuple[list[str], Router, list]:
    """Run a script; checks as it goes. Returns what was chosen, the router and the choices still open."""
    router = Router(RoutingOptions(admission=admission), seed=seed)
    up: dict[str, Replica] = {}
    steps: dict[str, int] = {}
    known_limit = 0
    limits: dict[str, int] = {}
    opened: list = []
    said: list[str] = []
    now = 0.0
    for act, *details in script:
        now += 0.02
        if act == "add":
            number, blocks = details
            one = replica(f"r{number}", pool=f"p{number % 2}", max_model_len=1024, total_blocks=blocks)
            router.add(one)
            up[one.replica_id] = one
            steps[one.replica_id] = 0
            limits[one.pool] = min(1024, blocks * BLOCK)
            known_limit = max(limits.values())
        elif act == "remove":
            router.remove(f"r{details[0]}")
            up.pop(f"r{details[0]}", None)
        elif act == "observe":
            number, more, running, prefill = details
            name = f"r{number}"
            steps[name] = steps.get(name, 0) + more
            router.observe(name, load(steps[name], running=running, prefill=prefill), cached=chain(more, 4), now=now)
        elif act == "choose":
            tokens, most, prefix = details
            fits = [n for n, r in up.items() if tokens + most <= min(r.max_model_len, r.total_blocks * BLOCK)]
            try:
                choice = router.choose(job(tokens, max_tokens=most, hashes=chain(prefix, tokens // BLOCK)), now=now)
            except RequestError:
                assert not fits
                assert tokens + most > known_limit
                said.append("never")
            except EngineDeadError:
                assert not fits
                said.append("dead")
            except OverloadedError as error:
                assert fits
                assert admission
                retry = error.retry_after_s
                said.append(f"later {retry}")
            else:
                assert choice.replica_id in fits
                assert 0 <= choice.cached_tokens < tokens
                assert choice.predicted_ttft_s > 0.0
                assert choice.predicted_tpot_s > 0.0
                opened.append(choice)
                said.append(f"{choice.replica_id} {choice.predicted_ttft_s}")
        elif act == "first" and details[0] < len(opened):
            router.first_token(opened[details[0]], now=now)
        elif act == "finish" and details[0] < len(opened):
            router.finished(opened.pop(details[0]), tokens=details[1], now=now)
        assert router.reserved == len(opened)
    assert all(0.0 < float(one.removeprefix("later ")) <= 60.0 for one in said if one.startswith("later"))
    return said, router, opened


@settings(deadline=None, max_examples=150)
@given(acts, st.booleans())
def test_only_where_it_fits_and_nothing_stays_reserved(script, admission):
    _, router, opened = play(script, seed=0, admission=admission)
    for choice in opened:
        router.finished(choice, tokens=1, now=1e3)
        router.finished(choice, tokens=1, now=1e3)
    assert router.reserved == 0
    for place in router._places.values():
        assert not place.unseen
        assert not place.waiting
        here = place.index._present[place.slot]
        assert set(here.values()) <= {1}, "what was expected of requests that are gone is still in the index"


@settings(deadline=None, max_examples=50)
@given(acts, st.integers(0, 3))
def test_equal_calls_and_seeds_give_equal_choices(script, seed):
    assert play(script, seed=seed, admission=True)[0] == play(script, seed=seed, admission=True)[0]


def test_nothing_up_and_never_fitting_differ():
    router = Router(FREE, seed=0)
    with pytest.raises(EngineDeadError):
        router.choose(job(), now=0.0)
    router.add(replica("a", max_model_len=200))
    with pytest.raises(RequestError) as caught:
        router.choose(job(190, max_tokens=50), now=0.0)
    assert caught.value.field == "max_tokens"
    assert caught.value.code == "context_length_exceeded"
    router.remove("a")
    with pytest.raises(EngineDeadError):
        router.choose(job(100), now=0.0)
    with pytest.raises(RequestError):
        router.choose(job(190, max_tokens=50), now=0.0)


def test_excluded_replicas_are_left_out():
    router = Router(FREE, seed=0)
    for name in "ab":
        router.add(replica(name))
    assert {router.choose(job(), now=0.0, exclude={"a"}).replica_id for _ in range(5)} == {"b"}
    with pytest.raises(EngineDeadError):
        router.choose(job(), now=0.0, exclude={"a", "b"})


def test_requests_between_two_steps_spread():
    router = Router(FREE, seed=0)
    for name in "abcd":
        router.add(replica(name))
        router.observe(name, load(), now=0.0)
    chosen = [router.choose(job(2000), now=0.0).replica_id for _ in range(8)]
    assert {name: chosen.count(name) for name in "abcd"} == dict.fromkeys("abcd", 2)


def test_reservation_falls_away_when_the_load_surely_includes_it():
    router = Router(FREE, seed=0)
    router.add(replica("a"))
    router.observe("a", load(5), now=0.0)
    before = router.choose(job(1000), now=0.0).predicted_ttft_s
    assert router.choose(job(1000), now=0.0).predicted_ttft_s > 1.5 * before
    place = router._places["a"]
    router.observe("a", load(6), now=0.1)
    assert len(place.unseen) == 2
    router.observe("a", load(7), now=0.2)
    assert not place.unseen


def test_prefix_sticks_when_it_pays_and_not_when_it_does_not():
    mine = chain(7, 60)
    router = Router(FREE, seed=0)
    for name in "abc":
        router.add(replica(name))
        router.observe(name, load(), now=0.0)
    router.observe("b", load(), cached=mine, now=0.0)
    choice = router.choose(job(970, hashes=mine), now=0.0)
    assert choice.replica_id == "b"
    assert choice.cached_tokens == 960
    router.finished(choice, tokens=1, now=0.0)
    router.observe("b", load(2, waiting=20, running=8, prefill=40_000), now=1.0)
    assert router.choose(job(970, hashes=mine), now=1.0).replica_id != "b"


def test_second_request_follows_the_first_with_the_same_prefix():
    mine = chain(3, 120)
    router = Router(FREE, seed=0)
    for name in "abcd":
        router.add(replica(name))
        router.observe(name, load(), now=0.0)
    first = router.choose(job(1921, hashes=mine), now=0.0)
    assert router.choose(job(1921, hashes=mine), now=0.0).cached_tokens == 1920
    router.remove(first.replica_id)
    assert router.choose(job(1921, hashes=mine), now=0.0).cached_tokens == 0


def test_overload_is_refused_with_a_time_and_urgent_requests_are_not():
    router = Router(RoutingOptions(admission=True), seed=0)
    router.add(replica("a"))
    router.observe("a", load(10, waiting=50, running=8, prefill=100_000), now=0.0)
    with pytest.raises(OverloadedError) as caught:
        router.choose(job(), now=0.0)
    queue_s = 100_000 * router.rates("a").prefill
    assert queue_s / 2 < caught.value.retry_after_s <= 60.0
    assert router.choose(job(priority=-1), now=0.0).replica_id == "a"
    router.observe("a", load(11), now=1.0)
    assert router.reserved == 1


def test_an_idle_replica_refuses_nothing():
    router = Router(RoutingOptions(admission=True), seed=0)
    router.add(replica("a", max_model_len=100_000, total_blocks=10_000))
    assert router.choose(job(90_000), now=0.0).predicted_ttft_s > 2.0


def test_a_guess_refuses_nothing():
    router = Router(RoutingOptions(admission=True), seed=0)
    router.add(replica("new", seats=256))
    router.observe("new", load(), now=0.0)
    for _ in range(200):
        router.choose(job(), now=0.0)
    assert router.reserved == 200


def test_slow_hardware_is_shared():
    router = Router(RoutingOptions(admission=True), seed=0)
    router.add(replica("cpu", seats=64))
    for steps in range(1, 200):  # a token takes 0.3 s, alone or with three others
        router.observe("cpu", load(steps, running=1 + steps % 4, per_step=0.3), now=0.3 * steps)
    choices = [router.choose(job(8, max_tokens=8), now=60.0) for _ in range(3)]
    assert all(choice.predicted_tpot_s > router.options.max_tpot_s for choice in choices)
    assert router.reserved == 3


def test_ingresses_that_know_the_same_choose_differently():
    chosen = set()
    for seed in range(8):
        router = Router(FREE, seed=seed)
        for i in range(10):
            router.add(replica(f"r{i}"))
            router.observe(f"r{i}", load(), now=0.0)
        chosen.add(router.choose(job(), now=0.0).replica_id)
    assert len(chosen) > 3
