"""Buckets and places: never more than the limit lets through, and ``Retry-After`` tells the truth."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.access.keys import ApiKey
from deployments.access.limits import MAX_RETRY_S, Bucket, KeyLimits, Slots, go_duration
from deployments.openai.errors import ApiError


def key(**limits: Any) -> ApiKey:
    created = datetime(2030, 1, 1, tzinfo=UTC)
    return ApiKey(id="0123abcd", name="a", hash="sha256:" + "0" * 64, created=created, **limits)


def limits(*, processes: int = 1, **options: Any) -> KeyLimits:
    return KeyLimits(key(**options), processes=processes, now=0.0)


@settings(deadline=None)
@given(
    rate=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), min_size=1, max_size=60),
)
def test_a_bucket_passes_its_rate_and_a_minutes_worth(rate: int, steps: list[tuple[float, int]]) -> None:
    bucket = Bucket(rate, now=0.0)
    now, taken = 0.0, 0
    for pause, amount in steps:
        now += pause
        if bucket.wait_s(amount, now=now) == 0:
            bucket.take(amount)
            taken += amount
    assert taken <= rate * (1 + now / 60) + 1e-6


@settings(deadline=None)
@given(rate=st.integers(1, 1000), used=st.integers(0, 3000), amount=st.integers(1, 1000))
def test_the_wait_is_exact(rate: int, used: int, amount: int) -> None:
    amount = min(amount, rate)
    bucket = Bucket(rate, now=0.0)
    bucket.take(used)
    wait_s = bucket.wait_s(amount, now=0.0)
    if wait_s:
        assert bucket.wait_s(amount, now=wait_s * 0.999 - 1e-6) > 0
    assert bucket.wait_s(amount, now=wait_s + 1e-6) == 0


def test_requests_a_minute() -> None:
    used = limits(requests_per_minute=60)
    for _ in range(60):
        used.enter(now=0.0)
    with pytest.raises(ApiError) as caught:
        used.enter(now=0.0)
    assert (caught.value.status, caught.value.type, caught.value.code) == (429, "requests", "rate_limit_exceeded")
    assert caught.value.headers == {"retry-after": "1", "retry-after-ms": "1000"}
    used.enter(now=1.001)
    fields = dict(used.headers(now=1.001))
    assert fields[b"x-ratelimit-limit-requests"] == b"60"
    assert fields[b"x-ratelimit-remaining-requests"] == b"0"
    assert fields[b"x-ratelimit-reset-requests"] == b"59.999s"
    assert b"x-ratelimit-limit-tokens" not in fields


def test_tokens_a_minute_are_charged_before_and_after() -> None:
    used = limits(tokens_per_minute=600)
    used.take_prompt(100, now=0.0)
    used.add_output(800)  # 300 in debt
    with pytest.raises(ApiError) as caught:
        used.take_prompt(100, now=0.0)
    assert (caught.value.status, caught.value.type) == (429, "tokens")
    assert caught.value.headers["retry-after"] == "40"
    used.take_prompt(100, now=40.001)
    with pytest.raises(ApiError) as never:
        used.take_prompt(601, now=1e6)
    assert never.value.status == 400, "coming back would not help"
    assert "retry-after" not in never.value.headers


def test_requests_at_once() -> None:
    used = limits(max_concurrent=2)
    first = used.enter(now=0.0)
    used.enter(now=0.0)
    assert first is not None
    with pytest.raises(ApiError) as caught:
        used.enter(now=0.0)
    assert caught.value.status == 429
    first.release(1.0)
    used.enter(now=1.0)


def test_whom_a_key_refuses_costs_it_nothing() -> None:
    used = limits(max_concurrent=1, requests_per_minute=2)
    slots = used.enter(now=0.0)
    assert slots is not None
    for _ in range(10):
        with pytest.raises(ApiError, match="at once"):
            used.enter(now=0.0)
    slots.release(0.1)
    used.enter(now=0.0)


def test_limits_are_divided_among_processes_and_follow_the_file() -> None:
    parts = [limits(processes=4, requests_per_minute=8, max_concurrent=8) for _ in range(4)]
    for part in parts:
        part.enter(now=0.0)
        slots = part.enter(now=0.0)
        assert slots is not None
        assert slots.limit == 2
        with pytest.raises(ApiError):
            part.enter(now=0.0)
    used = limits(requests_per_minute=1)
    used.enter(now=0.0)
    used.configure(key(requests_per_minute=600), processes=1, now=0.0)
    with pytest.raises(ApiError) as caught:  # a change of the limit is no new minute
        used.enter(now=0.0)
    assert caught.value.headers["retry-after-ms"] == "100"
    used.configure(key(), processes=1, now=0.0)
    used.enter(now=0.0)
    assert used.headers(now=0.0) == []


def test_promises_follow_each_other_at_the_rate_of_service() -> None:
    slots = Slots(10)
    for _ in range(30):
        slots.acquire()
        slots.release(2.0)
    for _ in range(10):
        slots.acquire()
    assert slots.full
    promises = [slots.promise_s(now=100.0) for _ in range(20)]
    assert promises == pytest.approx([0.2 * (n + 1) for n in range(20)])
    assert slots.promise_s(now=200.0) == pytest.approx(0.2), "promises of long ago don't count"
    assert max(slots.promise_s(now=300.0) for _ in range(10_000)) <= MAX_RETRY_S


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (59.9991, "1m0s"), (360, "6m0s"), (61.25, "1m1.25s")],
)
def test_durations_look_like_openais(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text
