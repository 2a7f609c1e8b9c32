"""Requests over time: a generator with stated statistics. Files of others are read by ``readers``."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.routing.types import Job

CLIENT_MAX_TOKENS = 2048
"""What clients allow; they rarely know how long an answer will be."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    """Tokens it will get; routers are not told."""
    hashes: Sequence[bytes]
    """Chain of the full blocks of prompt and output."""
    job: Job
    session: int = 0


def name_block(content: int, position: int) -> bytes:
    """A block's hash: whose tokens, and the how manieth block. Chains are equal exactly where tokens are."""
    return (content << 40 | position).to_bytes(16, "little")


def make_request(
    arrival_s: float,
    prompt_tokens: int,
    output_tokens: int,
    hashes: Sequence[bytes],
    *,
    block_size: int,
    max_tokens: int = CLIENT_MAX_TOKENS,
    session: int = 0,
) -> Request:
    """A request whose ``hashes`` name the full blocks of prompt and output."""
    job = Job(
        prompt_tokens=prompt_tokens,
        max_tokens=max(output_tokens, max_tokens),
        block_hashes={block_size: hashes[: prompt_tokens // block_size]},
    )
    return Request(arrival_s, prompt_tokens, output_tokens, hashes, job, session)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths in tokens: log-normal by median and sigma of the logarithm, cut to [least, most]."""

    median: float
    sigma: float
    least: int = 1
    most: int = 1 << 20

    def draw(self, rng: random.Random) -> int:
        return int(min(max(rng.lognormvariate(math.log(self.median), self.sigma), self.least), self.most))


@dataclass(frozen=True, slots=True)
class Workload:
    """Statistics of a generated trace. Everything is drawn from one seed.

    Sessions begin as a Poisson process whose rate is modulated by ``burst``: for ``burst_s`` seconds of every
    ``burst_period_s`` it is ``burst`` times the rate outside, the mean rate being as asked. A session has a geometric
    number of turns with the mean ``turns``; each turn's prompt is everything before, the answer included, and a new
    message; it comes a log-normal ``think`` time after the answer is taken to have ended (``assumed_tpot_s`` a token),
    whatever the server does (open loop). The first prompt begins with one of ``groups`` system prompts, chosen by
    Zipf's law (weight 1/k), unless ``groups`` is 0.
    """

    message: LogNormal
    output: LogNormal
    groups: int = 0
    system: LogNormal = LogNormal(1024, 0.5, 64, 16384)
    turns: float = 1.0
    think: LogNormal = LogNormal(8, 0.8, 1, 60)
    burst: float = 1.0
    burst_s: float = 5.0
    burst_period_s: float = 30.0
    most_prompt_tokens: int = 30000
    assumed_tpot_s: float = 0.04

    def generate(self, *, rate: float, seconds: float, block_size: int, seed: int) -> list[Request]:
        """Requests that arrive within ``seconds``, ``rate`` of them a second on average, by arrival.

        Sessions begin from before the start, so that turns of all ages are there from the beginning.
        """
        rng = random.Random(seed)
        systems = [self.system.draw(rng) for _ in range(self.groups)]
        weights = [1.0 / (k + 1) for k in range(self.groups)]
        lead_s = 0.0 if self.turns <= 1 else 60.0
        requests: list[Request] = []
        for session, start in enumerate(self._starts(rng, rate / self.turns, -lead_s, seconds), 1):
            group = rng.choices(range(self.groups), weights)[0] if self.groups else -1
            requests += self._session(
                rng, start, seconds, session=session, group=group,
                shared=systems[group] if self.groups else 0, block_size=block_size,
            )  # fmt: skip
        requests.sort(key=lambda request: request.arrival_s)
        return requests

    def _starts(self, rng: random.Random, rate: float, begin: float, end: float) -> list[float]:
        """Thinning (Lewis and Shedler 1979)."""
        share = self.burst_s / self.burst_period_s
        low = rate / (1.0 + share * (self.burst - 1.0))
        highest = low * max(self.burst, 1.0)
        starts = []
        now = begin
        while (now := now + rng.expovariate(highest)) < end:
            here = low * (self.burst if now % self.burst_period_s < self.burst_s else 1.0)
            if rng.random() * highest < here:
                starts.append(now)
        return starts

    def _session(
        self, rng: random.Random, start: float, end: float, *, session: int, group: int, shared: int, block_size: int
    ) -> list[Request]:
        requests: list[Request] = []
        tokens = shared
        names = [name_block(1 << 40 | group, i) for i in range(shared // block_size)]
        now = start
        while now < end:
            prompt = tokens + self.message.draw(rng)
            output = self.output.draw(rng)
            if prompt > self.most_prompt_tokens and requests:
                break
            prompt = min(prompt, self.most_prompt_tokens)
            tokens = prompt + output
            names += [name_block(session, i) for i in range(len(names), tokens // block_size)]
            if now >= 0.0:
                hashes = names[: tokens // block_size]
                requests.append(make_request(now, prompt, output, hashes, block_size=block_size, session=session))
            if rng.random() >= 1.0 - 1.0 / self.turns:
                break
            now += output * self.assumed_tpot_s + self.think.draw(rng)
        return requests
