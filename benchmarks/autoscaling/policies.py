"""What is compared: the plan, Serve's request count, and replicas that never change."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.autoscaling.fleet import View
from deployments.autoscaling import Memory, plan


class Planned:
    """``deployments.autoscaling.plan``, all pools at once."""

    def __init__(self) -> None:
        self._memory = Memory()

    def decide(self, views: Sequence[View], *, now: float) -> dict[str, int]:
        targets, self._memory = plan([view.state for view in views], self._memory, now=now)
        return targets


class RequestCount:
    """Serve's default policy: so many ongoing requests on each replica, by the mean of the last 30 s.

    The rules of Ray 2.60's ``_core_replica_queue_length_policy`` and ``_apply_delay_logic``, whose clock is the real
    one.
    """

    def __init__(self, target_ongoing_requests: float, *, upscale_delay_s: float, downscale_delay_s: float) -> None:
        self._target = target_ongoing_requests
        self._up_s = upscale_delay_s
        self._down_s = downscale_delay_s
        self._since: dict[str, tuple[int, float]] = {}  # by pool: direction, and since when it is wanted

    def decide(self, views: Sequence[View], *, now: float) -> dict[str, int]:
        return {view.state.options.pool: self._one(view, now) for view in views}

    def _one(self, view: View, now: float) -> int:
        state, name = view.state, view.state.options.pool
        current = len(state.replicas)
        desired = state.target if current == 0 else math.ceil(view.ongoing / self._target)
        direction = (desired > state.target) - (desired < state.target)
        if direction == 0:
            self._since.pop(name, None)
            return state.target
        if direction < 0 and state.target > 1:
            desired = max(desired, 1)
        if self._since.get(name, (0, 0.0))[0] != direction:
            self._since[name] = (direction, now)
        if now - self._since[name][1] < (self._up_s if direction > 0 else self._down_s):
            return state.target
        del self._since[name]
        return max(state.options.min_replicas, min(desired, state.options.max_replicas))


class Fixed:
    """As many as there may be, always."""

    def decide(self, views: Sequence[View], *, now: float) -> dict[str, int]:
        return {view.state.options.pool: view.state.options.max_replicas for view in views}
