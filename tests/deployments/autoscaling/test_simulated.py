"""The plan over simulated engines, routers and all: short versions of ``benchmarks.autoscaling``."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.autoscaling.__main__ import simulate
from benchmarks.autoscaling.policies import Fixed, Planned, RequestCount
from benchmarks.autoscaling.scenarios import Scenario, bursts, pool
from benchmarks.routing.scenarios import H20_300B

POOL = pool(H20_300B, start_s=30, min_replicas=0, max_replicas=4, downscale_delay_s=60.0)
TIDE = Scenario(
    name="tide",
    about="nothing, then 1.5 requests/s for 5 of 8 minutes",
    rate=bursts(0, 1.5, seconds=300, period_s=480),
    most=1.5,
    seconds=480,
    pools=(POOL,),
)


def test_the_plan_serves_nearly_as_many_well_as_all_replicas_for_less() -> None:
    scenario = replace(TIDE, rate=lambda now: 1.0, seconds=1200, pools=(replace(POOL, initial=1),))
    requests = scenario.requests(seed=5)
    ours = simulate(scenario, Planned, requests, seed=5)
    most = simulate(scenario, Fixed, requests, seed=5)
    counted = simulate(scenario, lambda: RequestCount(64, upscale_delay_s=10, downscale_delay_s=60), requests, seed=5)
    assert ours["unanswered"] == 0
    assert ours["accelerator_hours"] < 0.8 * most["accelerator_hours"]
    assert ours["good_share"] > 0.8 * most["good_share"]
    assert ours["good_share"] >= counted["good_share"]


def test_from_zero_and_back_with_replicas_that_die_no_request_is_lost() -> None:
    scenario = replace(TIDE, kill_every_s=100)
    requests = scenario.requests(seed=3)
    result = simulate(scenario, Planned, requests, seed=3, admission=False)
    assert (result["turned_away"], result["unanswered"]) == (0, 0)
    assert result["most"]["h20"] >= 2
