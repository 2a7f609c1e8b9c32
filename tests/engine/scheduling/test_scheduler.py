from __future__ import annotations

import itertools

import pytest

from engine.errors import RequestError
from engine.sampling_params import SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.part import ScheduledRequest
from engine.scheduling.request import Request, RequestStatus
from engine.scheduling.scheduler import Scheduler

names = (f"r{i}" for i in itertools.count())


def request(prompt: int | list[int], max_tokens: int = 8, **options: object) -> Request:
    """A request for given tokens, or for so many that nobody else has."""
    name = next(names)
    if isinstance(prompt, int):
        first = 1000 * int(name[1:])
        prompt = list(range(first, first + prompt))
    return Request(name, prompt, SamplingParams(seed=0), max_tokens, **options)  # type: ignore[arg-type]


def scheduler(num_blocks: int = 100, block_size: int = 4, **options: int | bool) -> Scheduler:
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 1000}
    return Scheduler(BlockPool(num_blocks, block_size), **(defaults | options))  # type: ignore[arg-type]


def parts(scheduled: list[ScheduledRequest]) -> list[tuple[Request, int, int, bool]]:
    return [(part.request, part.start, part.num_new_tokens, part.samples) for part in scheduled]


def step(scheduler: Scheduler) -> list[tuple[Request, int, int, bool]]:
    """Schedule and 'compute': every sampled token is 7."""
    scheduled = scheduler.schedule()
    scheduler.update(scheduled, {part.request.request_id: 7 for part in scheduled if part.samples})
    scheduler.check()
    return parts(scheduled)


def test_a_request_is_prefilled_and_then_decodes_one_token_a_step() -> None:
    s, a = scheduler(), request(5)
    s.add(a)
    assert step(s) == [(a, 0, 5, True)]
    assert a.output_token_ids == [7]
    assert step(s) == [(a, 5, 1, True)]
    assert a.all_token_ids == [*a.prompt_token_ids, 7, 7]
    assert len(a.block_table) == 2


def test_a_long_prompt_goes_in_chunks_and_samples_only_with_its_last() -> None:
    s, a, b = scheduler(max_num_batched_tokens=8), request(20), request(3)
    s.add(a)
    s.add(b)
    assert step(s) == [(a, 0, 8, False)]
    assert s.num_prefill_tokens == 12 + 3
    assert step(s) == [(a, 8, 8, False)]
    assert a.output_token_ids == []
    assert step(s) == [(a, 16, 4, True), (b, 0, 3, True)]
    assert s.num_prefill_tokens == 0
    assert step(s) == [(a, 20, 1, True), (b, 3, 1, True)]


def test_running_requests_come_before_waiting_ones() -> None:
    s, a, b = scheduler(max_num_batched_tokens=4), request(2), request(10)
    s.add(a)
    step(s)
    s.add(b)
    assert step(s) == [(a, 2, 1, True), (b, 0, 3, False)]


def test_max_num_seqs_bounds_the_running_requests() -> None:
    s, (a, b, c) = scheduler(max_num_seqs=2), (request(2) for _ in range(3))
    for one in (a, b, c):
        s.add(one)
    assert [one for one, *_ in step(s)] == [a, b]
    assert (s.num_running, s.num_waiting) == (2, 1)
    s.finish(a)
    assert [one for one, *_ in step(s)] == [b, c]


def test_without_chunked_prefill_a_prompt_waits_until_the_budget_holds_it_whole() -> None:
    s, a, b = scheduler(max_num_batched_tokens=8, enable_chunked_prefill=False), request(3), request(8)
    s.add(a)
    s.add(b)
    assert step(s) == [(a, 0, 3, True)]
    assert step(s) == [(a, 3, 1, True)]
    s.finish(a)
    assert step(s) == [(b, 0, 8, True)]
    with pytest.raises(RequestError, match="chunked prefill is off") as refusal:
        s.add(request(9))
    assert refusal.value.field == "prompt"


def test_without_chunked_prefill_a_recomputation_larger_than_the_budget_still_goes() -> None:
    s = scheduler(num_blocks=6, max_num_batched_tokens=8, enable_chunked_prefill=False, enable_prefix_caching=False)
    a, b = request(2, max_tokens=20), request(6, max_tokens=9)
    s.add(a)
    s.add(b)
    while not b.num_preemptions:
        step(s)
    assert b.num_tokens == 13
    s.finish(a)
    assert step(s) == [(b, 0, 8, False)]
    assert step(s) == [(b, 8, 5, True)]


def test_a_prefix_is_found_once_the_step_that_computes_it_is_complete() -> None:
    s, prompt = scheduler(max_num_batched_tokens=100), list(range(10))
    a, b = request(prompt), request(prompt[:8] + list(range(50, 70)))
    s.add(a)
    s.add(b)
    assert step(s) == [(a, 0, 10, True), (b, 0, 28, True)]  # of b, too little is a's
    assert a.block_table[:2] == b.block_table[:2]  # two copies were computed, one is kept
    assert a.block_table[2] != b.block_table[2]
    c = request(prompt)
    s.add(c)
    assert (c, 8, 2, True) in step(s)
    assert (a.num_cached_tokens, c.num_cached_tokens) == (0, 8)
    assert c.block_table[:2] == a.block_table[:2]


def test_one_prefix_of_several_that_come_together_is_computed_once() -> None:
    s, prompt = scheduler(max_num_batched_tokens=16), list(range(22))
    copies = [request(prompt) for _ in range(3)]
    last = request(5)
    for one in (*copies, last):
        s.add(one)
    assert step(s) == [(copies[0], 0, 16, False)]
    assert step(s) == [(copies[0], 16, 6, True)]  # the others wait for its fifth block, and so does who comes after
    assert step(s) == [(copies[0], 22, 1, True), (copies[1], 20, 2, True), (copies[2], 20, 2, True), (last, 0, 5, True)]
    assert s.totals.prefill_tokens == 22 + 2 + 2 + 5
    assert (s.totals.queried_tokens, s.totals.cached_tokens) == (22 * 3 + 5, 40)


def test_who_waits_for_a_prefix_computes_it_if_the_other_is_gone() -> None:
    s, prompt = scheduler(), list(range(22))
    a, b = request(prompt), request(prompt)
    s.add(a)
    s.add(b)
    scheduled = s.schedule()
    assert [part.request for part in scheduled] == [a]
    s.abort(a.request_id)
    s.update(scheduled, {a.request_id: 7})
    assert step(s) == [(b, 0, 22, True)]


def test_a_lower_number_goes_first_and_is_preempted_last() -> None:
    s = scheduler(num_blocks=8, block_size=2, max_num_seqs=3)
    low, high, middle = (request(2, max_tokens=12, priority=priority) for priority in (5, -5, 0))
    s.add(low)
    step(s)
    s.add(middle)
    s.add(high)
    assert [one for one, *_ in step(s)] == [low, high, middle]  # who runs already is served before who waits
    assert [one for one, *_ in step(s)] == [high, middle, low]
    while low.status is RequestStatus.RUNNING:
        step(s)
    assert (high.num_preemptions, middle.num_preemptions) == (0, 0)
    late = request(2, priority=4)
    s.add(late)
    s.finish(high)
    s.finish(middle)
    assert [one for one, *_ in step(s)] == [late, low]
    assert s.totals.preemptions == 1


def test_a_held_request_keeps_its_place_and_holds_up_nobody() -> None:
    s, held, other, last = scheduler(max_num_seqs=2), request(3), request(3), request(3)
    s.add(held, held=True)
    s.add(other)
    assert (s.num_waiting, s.num_prefill_tokens) == (2, 6)
    assert [one for one, *_ in step(s)] == [other]
    s.add(last, held=True)
    s.release(last)
    s.release(held)
    assert [one for one, *_ in step(s)] == [other, held]
    s.abort(other.request_id)
    assert [one for one, *_ in step(s)] == [held, last]
    gone = request(3)
    s.add(gone, held=True)
    assert s.abort(gone.request_id)
    s.check()


def test_given_output_is_prefilled_like_a_prompt() -> None:
    s, a = scheduler(max_num_batched_tokens=8), request([1, 2, 3], max_tokens=16, output_token_ids=[7] * 9)
    s.add(a)
    assert step(s) == [(a, 0, 8, False)]
    assert step(s) == [(a, 8, 4, True)]
    assert a.output_token_ids == [7] * 10
    b = request([1, 2, 3], max_tokens=16, output_token_ids=[7] * 9)
    s.add(b)
    assert (b, 8, 4, True) in step(s)
    assert b.num_cached_tokens == 3  # of the prompt


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_prompt_token_is_always_computed(length: int, cached: int) -> None:
    s, prompt = scheduler(), list(range(length))
    first, second = request(prompt), request(prompt)
    s.add(first)
    step(s)
    s.finish(first)
    s.add(second)
    assert step(s) == [(second, cached, length - cached, True)]
    assert second.num_cached_tokens == cached


def test_output_tokens_can_be_a_prefix_too() -> None:
    s, a = scheduler(), request([1, 2, 3])
    s.add(a)
    for _ in range(6):
        step(s)
    s.finish(a)
    b = request([1, 2, 3, 7, 7, 7, 7, 7, 5])
    s.add(b)
    assert step(s) == [(b, 8, 1, True)]


def test_without_prefix_caching_everything_is_computed() -> None:
    s, prompt = scheduler(enable_prefix_caching=False), list(range(10))
    for one in (request(prompt), request(prompt)):
        s.add(one)
        assert (one, 0, 10, True) in step(s)
        assert one.block_hashes == []


def test_the_latest_arrival_is_preempted_keeps_its_tokens_and_comes_back_first() -> None:
    s = scheduler(num_blocks=6, block_size=2)
    a, b, c = request(3, max_tokens=9), request(3, max_tokens=9), request(1, max_tokens=2)
    for one in (a, b, c):
        s.add(one)
    step(s)
    assert (a.status, b.status, c.status) == (RequestStatus.RUNNING, RequestStatus.RUNNING, RequestStatus.WAITING)
    while b.status is RequestStatus.RUNNING:
        step(s)
    outputs = list(b.output_token_ids)
    assert outputs
    assert len(b.block_table) == 0
    assert b.num_computed_tokens == 0
    s.finish(a)
    assert [one for one, *_ in step(s)] == [b, c]
    assert b.output_token_ids == [*outputs, 7]
    assert b.num_preemptions == 1
    assert b.num_cached_tokens == 0  # what it found again was its own


def test_recomputation_after_preemption_uses_what_is_still_cached() -> None:
    s = scheduler(num_blocks=8, block_size=2)
    a, b = request(4, max_tokens=12), request(4, max_tokens=12)
    s.add(a)
    s.add(b)
    while not b.num_preemptions:
        step(s)
    s.finish(a)
    [(again, start, num_new_tokens, samples)] = step(s)
    assert again is b
    assert start >= 4
    assert start + num_new_tokens == b.num_tokens - 1
    assert samples


def test_recomputed_blocks_can_be_found_again() -> None:
    s = scheduler(num_blocks=6, block_size=2)
    a, b = request(2, max_tokens=10), request(2, max_tokens=10)
    s.add(a)
    s.add(b)
    while len(a.output_token_ids) < a.max_tokens:  # a ends up with all blocks, so that nothing of b remains
        step(s)
    s.finish(a)
    assert b.num_preemptions == 1
    assert step(s) == [(b, 0, b.num_tokens - 1, True)]
    s.finish(b)
    again = request(b.prompt_token_ids + b.output_token_ids, max_tokens=2)
    s.add(again)
    [(_, start, num_new_tokens, _)] = step(s)
    assert start == (len(again.prompt_token_ids) - 1) // 2 * 2
    assert num_new_tokens <= 2


def test_admission_leaves_a_block_for_each_running_request() -> None:
    s = scheduler(num_blocks=5, block_size=4)
    a, b = request(8, max_tokens=8), request(12, max_tokens=4)
    s.add(a)
    s.add(b)
    assert [one for one, *_ in step(s)] == [a]
    s.finish(a)
    assert [one for one, *_ in step(s)] == [b]


def test_a_prefix_held_by_others_costs_no_free_blocks() -> None:
    s, prompt = scheduler(num_blocks=7, block_size=4), list(range(16))
    a, b = request(prompt, max_tokens=4), request(prompt, max_tokens=4)
    s.add(a)
    step(s)
    s.add(b)
    # When a has its fifth block, two are free: b's fourth, and the one that is kept for a.
    assert step(s) == [(a, 16, 1, True), (b, 12, 4, True)]
    assert s.pool.num_free == 2  # b's fourth was a's fourth once more, and was given back


def test_a_free_cached_prefix_counts_against_the_free_blocks() -> None:
    s, prompt = scheduler(num_blocks=6, block_size=4), list(range(16))
    a, b, c = request(prompt), request(8, max_tokens=8), request(prompt, max_tokens=4)
    s.add(a)
    step(s)
    s.finish(a)
    s.add(b)
    s.add(c)
    # Beside b's two blocks four are free, three of them hold c's prefix: with its own and b's reserve that makes five.
    assert [one for one, *_ in step(s)] == [b]
    s.finish(b)
    assert step(s) == [(c, 12, 4, True)]


def test_what_can_never_fit_is_refused() -> None:
    s = scheduler(num_blocks=4, block_size=4, max_model_len=14)
    for num_prompt, max_tokens, field in ((14, 1, "prompt"), (20, 1, "prompt"), (13, 2, "max_tokens")):
        with pytest.raises(RequestError, match="max_model_len is 14") as refusal:
            s.add(request(num_prompt, max_tokens))
        assert (refusal.value.field, refusal.value.code) == (field, "context_length_exceeded")
    s.add(request(13, 1))
    small = scheduler(num_blocks=2, block_size=4)
    with pytest.raises(RequestError, match="the whole KV cache is 8") as refusal:
        small.add(request(7, 2))
    assert refusal.value.field == "max_tokens"
    assert not small.has_work


def test_an_id_in_use_is_refused_and_the_first_request_goes_on() -> None:
    s, a = scheduler(), request(3)
    s.add(a)
    for _ in range(2):  # waiting, then running
        with pytest.raises(RequestError, match="in use"):
            s.add(Request(a.request_id, [1], a.params, 1))
        assert step(s)[0][0] is a
    s.finish(a)
    s.add(Request(a.request_id, [1], a.params, 1))


def test_aborts_in_any_state_free_everything() -> None:
    s, (a, b) = scheduler(max_num_seqs=1), (request(3) for _ in range(2))
    s.add(a)
    s.add(b)
    step(s)
    assert s.num_prefill_tokens == 3
    assert s.abort(b.request_id)
    assert s.num_prefill_tokens == 0
    assert s.abort(a.request_id)
    assert not s.abort(a.request_id)
    assert not s.abort("never seen")
    assert not s.has_work
    assert s.schedule() == []
    assert s.pool.num_free == s.pool.num_blocks
    s.check()


def test_an_abort_during_a_step_leaves_the_others_alone() -> None:
    s, a, b = scheduler(), request(3), request(3)
    s.add(a)
    s.add(b)
    scheduled = s.schedule()
    s.abort(a.request_id)
    s.add(Request(a.request_id, [1, 2], a.params, 5))  # a new request of the same id
    s.update(scheduled, {a.request_id: 7, b.request_id: 8})
    assert (a.output_token_ids, b.output_token_ids) == ([], [8])
    s.check()
    assert [(start, num) for _, start, num, _ in step(s)] == [(3, 1), (0, 2)]
