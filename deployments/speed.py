"""What an engine's replica tells Serve, and Serve the pool's autoscaling policy."""

from __future__ import annotations

from deployments.routing.rates import PoolRates, ReplicaRates
from engine.messages import EngineLoad

FORGET_S = 600.0
"""Seconds of work after which an observation of the engine's speed counts 1/e: Serve calls seldom."""


class Speed:
    """Turns an engine's totals into rates, over the time between two calls."""

    def __init__(self) -> None:
        self._last: tuple[float, EngineLoad] | None = None
        self._refused_tokens = 0.0
        self._learner = ReplicaRates(PoolRates(), forget_s=FORGET_S)

    def turned_away(self, prompt_tokens: float) -> None:
        """Note the prompts of requests that no engine took; an ingress tells one engine or another of them."""
        self._refused_tokens += prompt_tokens

    def stats(self, load: EngineLoad, *, now: float) -> dict[str, float]:
        """Loads as they are, and rates since the call before.

        ``busy`` is the share of the time in which a step ran; tokens are per second of that, so they tell of the
        engine and not of the traffic. 0 where there was none. The last five are what is learned of its steps, see
        :class:`deployments.routing.rates.Rates`; ``learned_s`` is 0 as long as they are only guessed.

        Prompts that were ``begun`` or ``refused`` are in tokens a second of the clock, those found in the prefix cache
        among them, so that the two compare. ``interval_s`` is the time since the call before, 0 at first.
        """
        self._learner.observe(load)
        learned = self._learner.rates
        before, earlier = self._last or (now, load)
        self._last = (now, load)
        busy_s = load.busy_seconds - earlier.busy_seconds
        interval_s = max(now - before, 0.0)
        refused = self._refused_tokens
        if interval_s:
            self._refused_tokens = 0.0
        # Without a prefix cache nothing is looked up.
        begun = max(load.queried_tokens - earlier.queried_tokens, load.prefill_tokens - earlier.prefill_tokens)

        def rate(total: int) -> float:
            return total / busy_s if busy_s > 0 else 0.0

        return {
            "waiting_requests": load.waiting_requests,
            "running_requests": load.running_requests,
            "waiting_prefill_tokens": load.waiting_prefill_tokens,
            "free_blocks": load.free_blocks,
            "total_blocks": load.total_blocks,
            "interval_s": interval_s,
            "busy": busy_s / interval_s if interval_s else 0.0,
            "begun_tokens_per_s": begun / interval_s if interval_s else 0.0,
            "refused_tokens_per_s": refused / interval_s if interval_s else 0.0,
            "prefill_tokens_per_s": rate(load.prefill_tokens - earlier.prefill_tokens),
            "decode_tokens_per_s": rate(load.decode_tokens - earlier.decode_tokens),
            "context_tokens_per_s": rate(load.context_tokens - earlier.context_tokens),
            "step_seconds": load.step_seconds,
            "preemptions": load.preemptions - earlier.preemptions,
            "step_s": learned.step,
            "prefill_s": learned.prefill,
            "decode_s": learned.decode,
            "context_s": learned.context,
            "learned_s": learned.seen,
        }
