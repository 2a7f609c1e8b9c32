"""How fast an engine computes, learned from what it says about its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.messages import EngineLoad


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of a step: ``step + prefill * prefill_tokens + decode * decode_tokens + context * context_tokens``."""

    step: float
    """Seconds of any step."""
    prefill: float
    """Seconds for each prompt token computed."""
    decode: float
    """Seconds for each token sampled."""
    context: float
    """Seconds for each token of the KV cache read."""
    seen: float = 0.0
    """Seconds of observed work that this rests on, older ones counting less; 0 for a guess."""


GUESS = Rates(step=0.02, prefill=2e-4, decode=5e-4, context=1e-7)
"""Before anything has been observed, of any hardware: only the order of magnitude matters, and that for one second of
work."""

POOL_PRIOR_S = 0.05
REPLICA_PRIOR_S = 3.0
"""A prior counts as much as so many seconds of observed work."""

FIRST_S = 1.0
"""What an engine did before it was first heard of counts as so many seconds of work at most."""

_NOTHING = EngineLoad(
    waiting_requests=0,
    running_requests=0,
    waiting_prefill_tokens=0,
    free_blocks=0,
    total_blocks=0,
    steps=0,
    step_seconds=0.0,
)


class Evidence:
    """Sums of a regression of step time on [1, prefill tokens, decode tokens, context tokens], older ones fading.

    The errors of a step's time are taken to be proportional to it, and every second of work counts alike, so of a
    stretch of work with the regressors ``x`` (summed over its steps) that took ``y`` seconds, ``x x^T / y`` and ``x``
    are kept. Both are sums over steps up to that division: a stretch of equal steps counts the same in one piece or
    many. Fading is by ``exp(-y / forget)``, in seconds of work, so an idle engine forgets nothing.
    """

    __slots__ = ("gram", "moment", "seen")

    def __init__(self) -> None:
        self.gram: NDArray[np.float64] = np.zeros((4, 4))
        self.moment: NDArray[np.float64] = np.zeros(4)
        self.seen = 0.0

    def add(self, stretch: NDArray[np.float64], seconds: float, forget_s: float) -> None:
        """Add a stretch of work: float64 [4], summed over its steps."""
        keep = math.exp(-seconds / forget_s)
        self.gram *= keep
        self.gram += np.multiply.outer(stretch, stretch / seconds)
        self.moment *= keep
        self.moment += stretch
        self.seen = self.seen * keep + seconds

    def solve(self, prior: Rates, prior_s: float) -> Rates:
        """The non-negative rates of least squared relative error, drawn to ``prior`` as by ``prior_s`` of work.

        Rates are fitted as multiples of the prior's (ridge regression towards 1), so units play no part. What comes out
        negative is set to 0 and the others are fitted again, as in the outer loop of Lawson and Hanson's NNLS (1974).
        """
        scale = np.array([prior.step, prior.prefill, prior.decode, prior.context]) + 1e-12
        gram = self.gram * np.multiply.outer(scale, scale)
        gram[range(4), range(4)] += prior_s
        moment = self.moment * scale + prior_s
        active = [0, 1, 2, 3]
        multiples = np.zeros(4)
        while active:
            part = np.linalg.solve(gram[np.ix_(active, active)], moment[active])
            if part.min() >= 0.0:
                multiples[active] = part
                break
            active = [index for index, value in zip(active, part, strict=True) if value > 0.0]
        step, prefill, decode, context = (float(value) for value in multiples * scale)
        return Rates(step, prefill, decode, context, self.seen)


class PoolRates:
    """What all replicas of a pool, present and past, have shown; where a new one starts."""

    def __init__(self) -> None:
        self.evidence = Evidence()
        self.rates = GUESS
        self._due_s = 0.0

    def add(self, stretch: NDArray[np.float64], seconds: float, forget_s: float) -> None:
        """Learn from a stretch of one replica's work."""
        self.evidence.add(stretch, seconds, forget_s)
        self._due_s -= seconds
        if self._due_s <= 0.0:
            self.rates = self.evidence.solve(GUESS, POOL_PRIOR_S)
            self._due_s = 0.3 * self.evidence.seen


class ReplicaRates:
    """Learns the rates of one engine from the differences of its loads."""

    def __init__(self, pool: PoolRates, *, forget_s: float) -> None:
        self._pool = pool
        self._forget_s = forget_s
        self._evidence = Evidence()
        self._last: EngineLoad | None = None
        self._due_s = 0.0
        self.rates = pool.rates

    def observe(self, load: EngineLoad) -> bool:
        """Take note of a load; returns whether :attr:`rates` has changed."""
        last, self._last = self._last or _NOTHING, load
        seconds = load.busy_seconds - last.busy_seconds
        steps = load.steps - last.steps
        if seconds <= 0.0 or steps <= 0:
            return False
        stretch = np.array(
            (
                steps,
                load.prefill_tokens - last.prefill_tokens,
                load.decode_tokens - last.decode_tokens,
                load.context_tokens - last.context_tokens,
            ),
            dtype=np.float64,
        )
        if stretch.min() < 0.0:  # totals that shrink are another engine's
            return False
        if last is _NOTHING and seconds > FIRST_S:  # the engine's whole past: a mean, worth little
            stretch *= FIRST_S / seconds
            seconds = FIRST_S
        self._evidence.add(stretch, seconds, self._forget_s)
        self._pool.add(stretch, seconds, 4.0 * self._forget_s)
        self._due_s -= seconds
        if self._due_s > 0.0:
            return False
        self.rates = self._evidence.solve(self._pool.rates, REPLICA_PRIOR_S)
        self._due_s = min(1.0, 0.2 * self._evidence.seen)
        return True
