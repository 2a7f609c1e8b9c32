"""Which replicas may take a request, those that would serve it late left out; and when to come back if none may."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from deployments.routing.options import RoutingOptions
from deployments.routing.place import Place
from deployments.routing.predict import Prediction, Row, Vector
from engine.errors import OverloadedError

HOPELESS_FACTOR = 1.5
HOPELESS_S = 0.2
"""A prompt that takes longer than the admission limit even where it could begin at once may take this factor of that,
and this much more."""
SLOW_FACTOR = 8.0
"""Where a token takes longer than the admission limit even for one request alone, as on many a CPU, the limit is this
factor of that: there is no service level to protect, and turning everybody but one away would help nobody."""
SURE_S = 0.1
"""Seconds of observed work from which a replica's rates are more than a guess."""
RETRY_S = (0.1, 60.0)
"""Least and most that a client is told to wait."""

Mask = NDArray[np.bool_]


class Admission:
    """The limits of the options, and where they give way."""

    def __init__(self, options: RoutingOptions) -> None:
        self._options = options

    def admit(self, state: Vector, told: Prediction, cost: Vector, *, usable: Mask, places: Collection[Place]) -> Mask:
        """Those of ``usable`` that can serve a request within the limits.

        Args:
            state: of the fleet, [len(Row), size].
            told: what the request would meet with.
            cost: as :func:`deployments.routing.cost.costs` has it, [size].
            usable: replicas that could take it at all, [size]; at least one.
            places: what is known of every replica.

        Raises:
            OverloadedError: none can.
        """
        options = self._options
        at_best = float(told.work[usable].min())
        most_ttft_s = max(options.max_ttft_s, HOPELESS_FACTOR * at_best + HOPELESS_S)
        allowed = (told.ttft <= most_ttft_s) & (told.tpot <= options.max_tpot_s) & usable
        allowed &= cost <= options.max_cost
        # An idle replica is as good as it gets.
        allowed |= (state[int(Row.REQUESTS)] < 1.0) & usable
        if not allowed.any():
            for place in places:  # a guess is no reason to refuse
                allowed[place.slot] = usable[place.slot] and place.rates.rates.seen < SURE_S
        if not allowed.any():
            alone = _tpot_alone(usable, places)
            if alone > options.max_tpot_s:
                allowed = (told.ttft <= most_ttft_s) & (told.tpot <= SLOW_FACTOR * alone) & usable
        if not allowed.any():
            wait = self._wait(state, told, usable, most_ttft_s=most_ttft_s)
            raise OverloadedError(
                f"every engine has more to do than it can do in time; try again in {wait:.1f} s", retry_after_s=wait
            )
        return allowed

    def _wait(self, state: Vector, told: Prediction, usable: Mask, *, most_ttft_s: float) -> float:
        """Seconds until the first replica will be able to serve it.

        A queue shrinks by a second a second, and a step by one request's part whenever one of its requests ends.
        """
        late = told.ttft - most_ttft_s
        each = state[Row.TPOT] / np.maximum(state[Row.REQUESTS], 1.0) + 1e-9
        surplus = np.maximum(told.tpot - self._options.max_tpot_s, 0.0) / each
        leave = surplus * state[Row.SPAN] / np.maximum(state[Row.REQUESTS], 1.0)
        wait = float(np.maximum(late, leave)[usable].min())
        return min(max(wait, RETRY_S[0]), RETRY_S[1])


def _tpot_alone(usable: Mask, places: Collection[Place]) -> float:
    """The least time between tokens of a request that has a replica to itself."""
    rates = [place.rates.rates for place in places if usable[place.slot]]
    return min(each.step + each.decode for each in rates)
