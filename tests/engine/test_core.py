from __future__ import annotations

import time

import pytest
import torch
from toy_executor import (
    EOS,
    VOCAB_SIZE,
    Collector,
    ToyExecutor,
    alone,
    make_core,
    make_request,
    mixed_requests,
    run,
)

from engine.errors import RequestError
from engine.messages import EngineRequest, FinishReason


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny


def test_totals_count_what_steps_do() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=32, block_size=4), max_num_batched_tokens=16)
    run(core, [make_request("a", list(range(3, 23)), 4)])
    load = core.load()
    assert (load.prefill_tokens, load.decode_tokens) == (20, 4)
    assert load.context_tokens == 16 + 20 + 21 + 22 + 23
    assert (load.queried_tokens, load.cached_tokens, load.preemptions) == (20, 0, 0)
    assert 0 < load.step_seconds < load.busy_seconds
    run(core, [make_request("b", list(range(3, 23)), 1)])
    after = core.load()
    assert (after.prefill_tokens, after.decode_tokens, after.steps) == (24, 5, load.steps + 1)
    assert (after.queried_tokens, after.cached_tokens) == (40, 16)


def test_totals_agree_with_what_came_out_under_preemption() -> None:
    requests = mixed_requests(24)
    core = make_core(ToyExecutor(num_kv_blocks=14, block_size=4), max_num_seqs=6, max_num_batched_tokens=30)
    together = run(core, requests)
    load = core.load()
    assert load.preemptions >= together.preemptions > 0
    assert load.decode_tokens == sum(map(len, together.token_ids.values()))
    prompts = sum(len(request.prompt_token_ids) for request in requests)
    assert load.queried_tokens == prompts
    assert load.cached_tokens == sum(last.num_cached_tokens for last in together.last.values())
    assert load.prefill_tokens >= prompts - load.cached_tokens


def test_the_first_tokens_say_how_long_the_request_waited() -> None:
    executor = ToyExecutor(num_kv_blocks=32, block_size=4)
    core = make_core(executor, max_num_seqs=1)
    core.add(make_request("a", [5], 2), submitted=time.perf_counter() - 5)
    core.add(make_request("b", [6], 2))
    first, second, third = core.step(), core.step(), core.step()
    assert 5 < first.deltas[0].queued_seconds < 60
    assert second.deltas[0].queued_seconds == 0
    assert 0 < third.deltas[0].queued_seconds < 5


def test_steps_tell_which_blocks_can_be_found() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=14, block_size=4), max_num_seqs=6, max_num_batched_tokens=30)
    known: set[bytes] = set()
    for request in mixed_requests(24):
        core.add(request)
    evictions = 0
    while core.has_work():
        output = core.step()
        assert not known & set(output.cached)
        assert known >= set(output.evicted)
        known = known.union(output.cached).difference(output.evicted)
        evictions += len(output.evicted)
        assert known == set(core.cached_blocks())
    assert evictions > 0


def test_every_request_ends_with_length_at_max_tokens() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=16, block_size=4))
    collector = run(core, [make_request("a", [5, 6, 7], 1), make_request("b", [5], 6)])
    assert [len(collector.token_ids[name]) for name in "ab"] == [1, 6]
    for name in "ab":
        assert collector.last[name].finish_reason is FinishReason.LENGTH
        assert collector.last[name].stop_token_id is None


def test_eos_stops_unless_it_is_ignored() -> None:
    bias = {EOS: 100.0}
    core = make_core(ToyExecutor(num_kv_blocks=16, block_size=4))
    collector = run(
        core,
        [
            make_request("stops", [5], logit_bias=bias, ignore_eos=False),
            make_request("goes on", [5], logit_bias=bias, ignore_eos=True),
            make_request("later", [5], logit_bias=bias, ignore_eos=False, min_tokens=3),
        ],
    )
    assert collector.token_ids["stops"] == [EOS]
    assert collector.last["stops"].finish_reason is FinishReason.STOP
    assert collector.last["stops"].stop_token_id == EOS
    assert collector.token_ids["goes on"] == [EOS] * 8
    assert len(collector.token_ids["later"]) == 4
    assert EOS not in collector.token_ids["later"][:3]
    assert collector.token_ids["later"][3] == EOS


def test_stop_token_ids_stop_even_where_eos_is_ignored() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=16, block_size=4))
    expected = alone(make_request("a", [5, 9], 8))
    stop = expected[4]
    collector = run(core, [make_request("a", [5, 9], 8, stop_token_ids=[stop])])
    assert collector.token_ids["a"] == expected[: expected.index(stop) + 1]
    assert collector.last["a"].finish_reason is FinishReason.STOP
    assert collector.last["a"].stop_token_id == stop


def test_a_stop_token_at_max_tokens_is_a_stop() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=16, block_size=4))
    collector = run(core, [make_request("a", [5], 1, stop_token_ids=[7], logit_bias={7: 100.0})])
    assert collector.last["a"].finish_reason is FinishReason.STOP


def test_deltas_carry_logprobs_and_cached_tokens() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=16, block_size=4))
    prompt = list(range(3, 13))
    first = run(core, [make_request("a", prompt, 3, logprobs=2)])
    second = run(core, [make_request("a", prompt, 3)])
    assert first.last["a"].num_cached_tokens == 0
    assert second.last["a"].num_cached_tokens == 8
    assert first.token_ids == second.token_ids
    [logprobs] = first.last["a"].logprobs or []
    assert logprobs.token_id == first.token_ids["a"][-1]
    assert len(logprobs.top) == 2
    assert second.last["a"].logprobs is None


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (make_request("a", []), "prompt"),
        (make_request("a", [1, VOCAB_SIZE]), "prompt"),
        (make_request("a", [-1, 1]), "prompt"),
        (make_request("a", [1] * 128, 1), "prompt"),
        (make_request("a", [1] * 120, 9), "max_tokens"),
        (make_request("a", [1], 0), "max_tokens"),
        (make_request("a", [1], temperature=1.0, seed=None), "seed"),
    ],
)
def test_what_would_fail_a_step_is_refused_at_the_door(request_: EngineRequest, field: str) -> None:
    core = make_core(ToyExecutor(num_kv_blocks=64, block_size=4, max_model_len=128))
    with pytest.raises(RequestError) as refusal:
        core.add(request_)
    assert refusal.value.field == field
    assert not core.has_work()


def test_a_duplicate_id_is_refused_and_the_first_goes_on() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=16, block_size=4))
    core.add(make_request("a", [5, 6], 3))
    with pytest.raises(RequestError, match="in use"):
        core.add(make_request("a", [7], 3))
    collector = Collector()
    while core.has_work():
        collector(core.step())
    assert collector.token_ids["a"] == alone(make_request("a", [5, 6], 3))


def test_aborts_free_blocks_at_once_wherever_the_request_is() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=8, block_size=4), max_num_seqs=2)
    for name in "abc":
        core.add(make_request(name, [5, 6, 7], 13))
    core.step()
    assert (core.load().running_requests, core.load().waiting_requests) == (2, 1)
    core.abort(["c", "nobody", "a"])
    assert (core.load().running_requests, core.load().waiting_requests) == (1, 0)
    assert [delta.request_id for delta in core.step().deltas] == ["b"]
    core.abort(["b", "b"])
    assert not core.has_work()
    assert core.load().free_blocks == 8
    core.check()


def test_a_preempted_request_can_be_aborted() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=6, block_size=2))
    core.add(make_request("a", [5, 6, 7], 9))
    core.add(make_request("b", [8, 9, 3], 9))
    while core.load().waiting_requests == 0 or core.load().steps == 0:
        core.step()
    core.abort(["b"])
    core.check()
    collector = Collector()
    while core.has_work():
        collector(core.step())
    assert set(collector.last) == {"a"}
    assert core.load().free_blocks == 6


def test_a_step_without_work_does_nothing() -> None:
    executor = ToyExecutor(num_kv_blocks=8, block_size=4)
    core = make_core(executor)
    output = core.step()
    assert output.deltas == []
    assert output.load.steps == executor.steps == 0


def test_load_counts_what_waits_and_what_runs() -> None:
    core = make_core(ToyExecutor(num_kv_blocks=32, block_size=4), max_num_batched_tokens=16)
    core.add(make_request("a", [5] * 20, 4))
    core.add(make_request("b", [6] * 7, 4))
    load = core.load()
    assert (load.waiting_requests, load.running_requests, load.waiting_prefill_tokens) == (2, 0, 27)
    load = core.step().load
    assert (load.waiting_requests, load.running_requests, load.waiting_prefill_tokens) == (1, 1, 11)
    assert (load.free_blocks, load.total_blocks, load.steps) == (28, 32, 1)
    assert load.step_seconds > 0
    load = core.step().load
    assert (load.waiting_requests, load.running_requests, load.waiting_prefill_tokens) == (0, 2, 0)


def test_shutdown_reaches_the_executor() -> None:
    executor = ToyExecutor(num_kv_blocks=8, block_size=4)
    make_core(executor).shutdown()
    assert executor.shutdowns == 1
