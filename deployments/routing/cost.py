"""What a request costs on each replica: the requests, itself among them, that will probably miss the service level.

A request's cost on a replica is the chance that it misses the service level there, and, for each request already
there, how much its chance grows. A chance is ``x**8 / (1 + x**8)`` of a predicted time over its limit, as predictions
err by some 20 %. Taking the least growth of a steep convex potential is the greedy rule of Aspnes, Azar, Fiat, Plotkin
and Waarts (JACM 1997) for jobs whose cost differs by machine, there within O(log machines) of the best assignment; its
proof doesn't carry over to ours. A little of the time and of the work itself is added, for when nothing is in danger.
"""

from __future__ import annotations

import numpy as np

from deployments.routing.options import RoutingOptions
from deployments.routing.predict import Prediction, Row, Vector

TIME_WEIGHT = 0.02
"""Cost of a prediction that meets the limit exactly, and of as much computing: what decides while all is well, and what
makes a request go where its prefix is. Small beside a miss, which costs 1."""
LATE_WEIGHT = 0.25
"""Cost of each limit's length that a first token is predicted to be late: a miss is better a near one."""


def costs(state: Vector, told: Prediction, options: RoutingOptions) -> Vector:
    """For every replica, float64 [size]; ``state`` is that of the :class:`~deployments.routing.predict.Fleet`."""
    ratio = told.ttft * (1.0 / options.slo_ttft_s)
    late = _chance(ratio)
    cost = _chance(told.tpot * (1.0 / options.slo_tpot_s))
    late *= 1.0 - cost
    cost += late
    missing = _chance(told.others_tpot * (1.0 / options.slo_tpot_s))
    missing *= state[int(Row.REQUESTS)]
    missing -= state[int(Row.MISSING)]
    cost += missing
    cost += told.work * (TIME_WEIGHT / options.slo_ttft_s)
    cost += ratio * TIME_WEIGHT
    ratio -= 1.0
    np.maximum(ratio, 0.0, out=ratio)
    ratio *= LATE_WEIGHT
    cost += ratio
    return cost


def missing(requests: float, tpot_s: float, options: RoutingOptions) -> float:
    """Of a replica's requests, how many will probably miss the service level as it is: its ``Row.MISSING``."""
    power = (tpot_s / options.slo_tpot_s) ** 8
    return requests * power / (1.0 + power)


def _chance(ratio: Vector) -> Vector:
    """That a time predicted as ``ratio`` of its limit will exceed it."""
    power = ratio * ratio
    power *= power
    power *= power
    power /= power + 1.0
    return power
