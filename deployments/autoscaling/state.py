"""What the plan is made from, and what it remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

MOST_DEMAND = 4.0
"""Times what is served: a client that is turned away comes again, and each time counts."""


@dataclass(frozen=True)
class PoolOptions:
    """What the configuration says of a pool; plain values, as they travel to Serve's controller as JSON."""

    pool: str
    min_replicas: int = 0
    max_replicas: int = 1
    cost: float = 1.0
    """Of a replica. The pool where it is least grows first and shrinks last."""
    max_num_seqs: int = 64
    block_size: int = 16
    slo_ttft_s: float = 2.0
    slo_tpot_s: float = 0.05
    target_utilization: float = 0.7
    """Of a replica's time, what requests add to it at most: prompts, and what each request makes a step longer."""
    upscale_delay_s: float = 10.0
    """A need for more must have lasted so long."""
    downscale_delay_s: float = 300.0
    """Nothing more than what remains must have been needed for so long."""
    downscale_to_zero_delay_s: float | None = None
    """The same for the last replica; None is ``downscale_delay_s``."""
    start_s: float = 60.0
    """How long a replica takes to start, as long as none has been seen to."""

    @property
    def to_zero_delay_s(self) -> float:
        """Seconds without any request until the last replica goes."""
        return self.downscale_delay_s if self.downscale_to_zero_delay_s is None else self.downscale_to_zero_delay_s


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: ``step + prefill * prompt tokens + decode * requests + context * tokens of KV cache read``."""

    step: float
    prefill: float
    decode: float
    context: float
    seen_s: float = 1.0
    """Of work, from which this was learned."""


@dataclass(frozen=True)
class Load:
    """Work for engines, of whatever speed: what comes in each second of the clock, and what is there."""

    prefill_tokens: float = 0.0
    """Prompt tokens computed a second."""
    decode_tokens: float = 0.0
    """Tokens sampled a second."""
    context_tokens: float = 0.0
    """Tokens of the KV cache read a second."""
    requests: float = 0.0
    """Waiting and running."""
    kv_tokens: float = 0.0
    """Room that requests hold in the KV cache."""
    begun_tokens: float = 0.0
    """Of the prompts that were begun a second, cached ones included, and of those that were turned away: """
    refused_tokens: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.prefill_tokens + other.prefill_tokens,
            self.decode_tokens + other.decode_tokens,
            self.context_tokens + other.context_tokens,
            self.requests + other.requests,
            self.kv_tokens + other.kv_tokens,
            self.begun_tokens + other.begun_tokens,
            self.refused_tokens + other.refused_tokens,
        )

    @property
    def demand(self) -> Load:
        """The load there would be if nobody had been turned away, taking those who were to be like the others."""
        if not self.refused_tokens:
            return self
        # Requests are begun wherever others are turned away; where none was, that will show at the next look.
        times = min(1.0 + self.refused_tokens / self.begun_tokens, MOST_DEMAND) if self.begun_tokens else MOST_DEMAND
        return replace(
            self,
            prefill_tokens=self.prefill_tokens * times,
            decode_tokens=self.decode_tokens * times,
            context_tokens=self.context_tokens * times,
            requests=self.requests * times,
            kv_tokens=self.kv_tokens * times,
        )

    @property
    def is_nothing(self) -> bool:
        """Whether nobody asks for anything."""
        return not (self.requests or self.prefill_tokens or self.decode_tokens)


@dataclass(frozen=True)
class ReplicaStats:
    """What one replica has said of itself, see ``deployments.speed``."""

    waiting_requests: float
    running_requests: float
    waiting_prefill_tokens: float
    free_blocks: float
    total_blocks: float
    prefill_tokens_per_s: float
    """Here and below: a second of the clock, idle time included."""
    decode_tokens_per_s: float
    context_tokens_per_s: float
    speed: Speed | None
    """None as long as it has computed nothing."""
    begun_tokens_per_s: float = 0.0
    """Here and below: of prompts, cached tokens included. Begun here,"""
    refused_tokens_per_s: float = 0.0
    """and turned away by an ingress that told this replica, as it might have told any other."""

    @classmethod
    def of(cls, samples: Sequence[Mapping[str, float]]) -> ReplicaStats:
        """From what ``Speed.stats`` returned at some times, the last being now: rates are means over all of them."""
        last = samples[-1]
        total_s = sum(sample.get("interval_s", 0.0) for sample in samples)

        def mean(name: str) -> float:
            if not total_s:
                return 0.0
            return sum(sample.get(name, 0.0) * sample.get("interval_s", 0.0) for sample in samples) / total_s

        def rate(name: str) -> float:
            if not total_s:
                return 0.0
            busy = (sample.get("busy", 0.0) * sample.get("interval_s", 0.0) for sample in samples)
            return sum(sample.get(name, 0.0) * busy_s for sample, busy_s in zip(samples, busy, strict=True)) / total_s

        learned_s = last.get("learned_s", 0.0)
        return cls(
            waiting_requests=last.get("waiting_requests", 0.0),
            running_requests=last.get("running_requests", 0.0),
            waiting_prefill_tokens=last.get("waiting_prefill_tokens", 0.0),
            free_blocks=last.get("free_blocks", 0.0),
            total_blocks=last.get("total_blocks", 0.0),
            prefill_tokens_per_s=rate("prefill_tokens_per_s"),
            decode_tokens_per_s=rate("decode_tokens_per_s"),
            context_tokens_per_s=rate("context_tokens_per_s"),
            speed=Speed(last["step_s"], last["prefill_s"], last["decode_s"], last["context_s"], learned_s)
            if learned_s > 0.0
            else None,
            begun_tokens_per_s=mean("begun_tokens_per_s"),
            refused_tokens_per_s=mean("refused_tokens_per_s"),
        )

    def load(self, block_size: int) -> Load:
        """Its part of the load."""
        return Load(
            self.prefill_tokens_per_s,
            self.decode_tokens_per_s,
            self.context_tokens_per_s,
            self.waiting_requests + self.running_requests,
            (self.total_blocks - self.free_blocks) * block_size,
            self.begun_tokens_per_s,
            self.refused_tokens_per_s,
        )


@dataclass(frozen=True)
class PoolState:
    """A pool as it is now."""

    options: PoolOptions
    target: int
    """Replicas asked for so far."""
    replicas: Mapping[str, ReplicaStats | None] = field(default_factory=dict)
    """Those that are up, by id; None for one that has said nothing yet."""
    requests: float = 0.0
    """Under way or held for want of a replica, as Serve counts them, which is late and knows nothing of short ones."""

    @property
    def held(self) -> float:
        """Requests beyond what the replicas that are up run at once; all of them while none is."""
        return max(self.requests - self.ready * self.options.max_num_seqs, 0.0)

    @property
    def ready(self) -> int:
        """Replicas that are up and not about to go."""
        return min(len(self.replicas), self.target)


@dataclass(frozen=True)
class Wish:
    """The replicas that a pool should have had for some time on."""

    since: float
    until: float
    up: int
    """At least so many, to serve the load."""
    down: int
    """No fewer than so many, to serve it with a margin."""


@dataclass(frozen=True)
class PoolMemory:
    """What is remembered of a pool."""

    speed: Speed | None = None
    """The mean of its replicas, when there last were any."""
    kv_tokens: float = 0.0
    """Room in the KV cache of one replica; 0 if unknown."""
    start_s: float | None = None
    """How long replicas take to start; None if none has been seen to."""
    asked: tuple[float, ...] = ()
    """When each replica that is not up yet was asked for."""
    known: frozenset[str] = frozenset()
    """Replicas that were up."""
    wishes: tuple[Wish, ...] = ()
    bound_until: float = 0.0
    """Until then its load is taken not to fit elsewhere: it was overloaded while others were not."""


@dataclass(frozen=True)
class Memory:
    """What is remembered between two decisions; give back what :func:`plan` returned."""

    pools: Mapping[str, PoolMemory] = field(default_factory=dict)
    loads: tuple[tuple[float, Load], ...] = ()
    """The load of all pools over time, for its trend."""
