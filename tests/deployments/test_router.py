from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.router import Candidate, Unseen, choose
from engine.messages import EngineLoad

IDLE = EngineLoad(0, 0, 0, 100, 100, steps=0, step_seconds=0.01)


def candidates() -> st.SearchStrategy[list[Candidate]]:
    counts = st.integers(0, 50)
    load = st.builds(
        lambda w, r, p: replace(IDLE, waiting_requests=w, running_requests=r, waiting_prefill_tokens=p), *[counts] * 3
    )
    one = st.builds(lambda load, unseen, own: (load, unseen, own), load, counts, counts)
    return st.lists(one, min_size=1, max_size=8).map(
        lambda rows: [Candidate(f"r{i}", load, unseen, own) for i, (load, unseen, own) in enumerate(rows)]
    )


@given(candidates(), st.randoms())
@settings(deadline=None)
def test_the_choice_is_least_loaded_and_does_not_depend_on_the_order(engines: list[Candidate], random: Random) -> None:
    chosen = choose(engines)

    def outstanding(engine: Candidate) -> int:
        return engine.load.waiting_requests + engine.load.running_requests + engine.unseen

    assert outstanding(chosen) == min(map(outstanding, engines))
    random.shuffle(engines)
    assert choose(engines) == chosen


def test_a_burst_between_two_steps_is_spread() -> None:
    unseen = {name: Unseen() for name in "abc"}
    for _ in range(30):
        chosen = choose([Candidate(name, IDLE, len(sent), in_flight=len(sent)) for name, sent in unseen.items()])
        unseen[chosen.replica_id].add()
    assert [len(sent) for sent in unseen.values()] == [10, 10, 10]


def test_a_request_counts_until_a_load_surely_includes_it() -> None:
    unseen = Unseen()
    unseen.update(replace(IDLE, steps=7))
    unseen.add()
    unseen.update(replace(IDLE, steps=8))  # may have been under way when the request came
    assert len(unseen) == 1
    unseen.add()
    unseen.update(replace(IDLE, steps=9))
    assert len(unseen) == 1
    unseen.update(replace(IDLE, steps=10))
    assert len(unseen) == 0
