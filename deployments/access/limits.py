"""How much: token buckets, places for requests at once, and both together for a key.

All times are seconds of one monotonic clock, which the caller reads. Nothing here waits or locks: an ingress has one
event loop.
"""

from __future__ import annotations

import math
from typing import Literal

from deployments.access.keys import ApiKey
from deployments.openai.errors import ApiError, retry_headers

MAX_RETRY_S = 60.0
"""Longest ``Retry-After`` of a full server; what is further away can't be foreseen."""
_FIRST_GUESS_S = 1.0
_SMOOTHING = 0.1

Unit = Literal["requests", "tokens"]


class Bucket:
    """A token bucket that holds one minute's worth and begins full.

    So over any stretch of ``t`` minutes at most ``(t + 1) * per_minute`` pass. It may go into debt, for what is only
    known afterwards; a debt is waited off.
    """

    def __init__(self, per_minute: float, *, now: float) -> None:
        self.capacity = per_minute
        self._level = per_minute
        self._updated = now

    def resize(self, per_minute: float, *, now: float) -> None:
        """Change the rate; what is in the bucket stays, up to the new capacity."""
        self._refill(now)
        self.capacity = per_minute
        self._level = min(self._level, per_minute)

    def wait_s(self, amount: float, *, now: float) -> float:
        """Seconds until ``amount`` could be taken; 0 if it can be now."""
        self._refill(now)
        return max(amount - self._level, 0.0) / self.capacity * 60.0

    def take(self, amount: float) -> None:
        """Take ``amount``, into debt if need be."""
        self._level -= amount

    def remaining(self, *, now: float) -> int:
        """Whole units that can be taken now."""
        self._refill(now)
        return max(math.floor(self._level), 0)

    def full_in_s(self, *, now: float) -> float:
        """Seconds until the bucket is full."""
        return self.wait_s(self.capacity, now=now)

    def _refill(self, now: float) -> None:
        self._level = min(self._level + (now - self._updated) * self.capacity / 60.0, self.capacity)
        self._updated = now


class Slots:
    """Places for requests at once. Who finds none is told when one is expected to come free.

    The places come free at ``limit / (mean duration)`` a second. Each refused request is promised the place after the
    one promised before it, so that they don't all come back at the same moment.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self._mean_s: float | None = None
        self._promised = 0.0

    @property
    def full(self) -> bool:
        """Whether there is no place."""
        return self.active >= self.limit

    def acquire(self) -> None:
        """Take a place."""
        self.active += 1

    def release(self, duration_s: float) -> None:
        """Give a place back that was held for so long."""
        self.active -= 1
        self._mean_s = duration_s if self._mean_s is None else self._mean_s + _SMOOTHING * (duration_s - self._mean_s)

    def promise_s(self, *, now: float) -> float:
        """Seconds until a place is expected for the request just refused, at most :data:`MAX_RETRY_S`."""
        mean_s = _FIRST_GUESS_S if self._mean_s is None else self._mean_s
        self._promised = min(max(self._promised, now) + mean_s / self.limit, now + MAX_RETRY_S)
        return self._promised - now


class KeyLimits:
    """What one key has used of its limits, in one ingress process."""

    def __init__(self, key: ApiKey, *, processes: int, now: float) -> None:
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._slots: Slots | None = None
        self.configure(key, processes=processes, now=now)

    def configure(self, key: ApiKey, *, processes: int, now: float) -> None:
        """Take over the limits of a record that may have changed; each of ``processes`` allows its part of them."""
        self._key = key
        self._requests = _resized(self._requests, key.requests_per_minute, processes, now=now)
        self._tokens = _resized(self._tokens, key.tokens_per_minute, processes, now=now)
        limit = key.max_concurrent
        if limit is None:
            self._slots = None
            return
        limit = max(limit // processes, 1)
        if self._slots is None:
            self._slots = Slots(limit)
        self._slots.limit = limit

    def enter(self, *, now: float) -> Slots | None:
        """Begin a request; returns what must be released when it ends.

        Raises:
            ApiError: 429, there are too many at once or in this minute.
        """
        slots, requests = self._slots, self._requests
        if slots is not None and slots.full:
            raise self._too_many(
                f"{slots.limit} requests at once", kind="requests", wait_s=slots.promise_s(now=now), now=now
            )
        if requests is not None:
            if (wait_s := requests.wait_s(1, now=now)) > 0:
                raise self._too_many(
                    f"{requests.capacity:g} requests a minute", kind="requests", wait_s=wait_s, now=now
                )
            requests.take(1)
        if slots is not None:
            slots.acquire()
        return slots

    def take_prompt(self, tokens: int, *, now: float) -> None:
        """Count the tokens of a prompt, before anything is computed.

        Raises:
            ApiError: 429, this minute's are used up; 400, a whole minute's are too few for this prompt.
        """
        bucket = self._tokens
        if bucket is None:
            return
        if tokens > bucket.capacity:
            raise ApiError(
                400,
                f"The prompt has {tokens} tokens, and the key {self._key.name!r} may use {bucket.capacity:g} a minute",
                code="tokens_exceed_limit",
            )
        # At least one: answers count when they end, and a debt of theirs stops even an empty prompt.
        if (wait_s := bucket.wait_s(max(tokens, 1), now=now)) > 0:
            raise self._too_many(f"{bucket.capacity:g} tokens a minute", kind="tokens", wait_s=wait_s, now=now)
        bucket.take(tokens)

    def add_output(self, tokens: int) -> None:
        """Count the tokens of an answer that has ended."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def headers(self, *, now: float) -> list[tuple[bytes, bytes]]:
        """OpenAI's ``x-ratelimit-*``, for the limits that the key has."""
        fields = []
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                fields += [
                    (f"x-ratelimit-limit-{kind}".encode(), b"%d" % bucket.capacity),
                    (f"x-ratelimit-remaining-{kind}".encode(), b"%d" % bucket.remaining(now=now)),
                    (f"x-ratelimit-reset-{kind}".encode(), go_duration(bucket.full_in_s(now=now)).encode()),
                ]
        return fields

    def _too_many(self, limit: str, *, kind: Unit, wait_s: float, now: float) -> ApiError:
        message = f"Rate limit reached for key {self._key.name!r}: {limit}. Try again in {go_duration(wait_s)}."
        return ApiError(429, message, type=kind, code="rate_limit_exceeded", headers=retry_headers(wait_s))


def _resized(bucket: Bucket | None, per_minute: int | None, processes: int, *, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    rate = max(per_minute / processes, 1.0)  # a bucket that holds less than one lets nothing through, ever
    if bucket is None:
        return Bucket(rate, now=now)
    if bucket.capacity != rate:
        bucket.resize(rate, now=now)
    return bucket


def go_duration(seconds: float) -> str:
    """A duration as OpenAI's headers have it: ``20ms``, ``1.5s``, ``6m0s``; rounded up."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    text = f"{milliseconds / 1000:g}s"
    return f"{minutes}m{text}" if minutes else text
