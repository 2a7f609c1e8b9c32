from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_executor import (
    EOS,
    USED_VOCAB_SIZE,
    VOCAB_SIZE,
    Collector,
    ToyExecutor,
    make_core,
    make_request,
    run,
    toy_logits,
)
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedModel

from engine.config import EngineConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import RequestError
from engine.execution.executor import Executor
from engine.messages import EngineRequest, FinishReason


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny


def alone(request: EngineRequest) -> list[int]:
    """The tokens a request gets with an engine of its own, a large cache and no prefix caching."""
    core = make_core(ToyExecutor(num_kv_blocks=64, block_size=4), enable_prefix_caching=False)
    return run(core, [request]).token_ids[request.request_id]


def mixed_requests(count: int, seed: int = 0) -> list[EngineRequest]:
    """Requests with shared prefixes, greedy and sampled, with and without EOS."""
    draw = random.Random(seed)
    stems = [[draw.randrange(3, USED_VOCAB_SIZE) for _ in range(24)] for _ in range(2)]
    return [
        make_request(
            f"r{i}",
            draw.choice(stems)[: draw.randrange(1, 24)]
            + [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(4))],
            draw.randrange(1, 24),
            temperature=draw.choice([0.0, 0.0, 1.5]),
            seed=draw.randrange(100),
            ignore_eos=draw.random() < 0.7,
            min_tokens=draw.choice([0, 0, 5]),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("enable_chunked_prefill", [True, False])
def test_with_a_cache_too_small_for_the_load_everyone_gets_the_tokens_it_gets_alone(
    enable_prefix_caching: bool, enable_chunked_prefill: bool
) -> None:
    requests = mixed_requests(24)
    executor = ToyExecutor(num_kv_blocks=14, block_size=4)
    core = make_core(
        executor,
        max_num_seqs=6,
        max_num_batched_tokens=30,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
    )
    together = run(core, requests)
    generated = 0
    for request in requests:
        token_ids = together.token_ids[request.request_id]
        assert token_ids == alone(request)
        assert max(token_ids) < USED_VOCAB_SIZE
        generated += len(token_ids)
    assert together.preemptions > 0
    assert executor.steps < generated


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_kv_blocks=st.integers(13, 30),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(1, 40),
    enable_prefix_caching=st.booleans(),
)
def test_no_schedule_changes_a_token(seed: int, num_kv_blocks: int, **options: int | bool) -> None:
    requests = mixed_requests(6, seed)
    together = run(make_core(ToyExecutor(num_kv_blocks=num_kv_blocks, block_size=4), **options), requests)
    for request in requests:
        assert together.token_ids[request.request_id] == alone(request)


def split(request: EngineRequest, tokens: list[int]) -> EngineRequest:
    """The request as another engine goes on with it."""
    return replace(request, output_token_ids=tokens)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([{}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": -0.4}]),
    logprobs=st.sampled_from([None, 2]),
    min_tokens=st.integers(0, 8),
    ignore_eos=st.booleans(),
    busy=st.booleans(),
)
def test_a_request_goes_on_elsewhere_as_if_nothing_had_happened(
    data: st.DataObject, seed: int, busy: bool, penalty: dict[str, float], **options: object
) -> None:
    prompt = data.draw(st.lists(st.integers(3, USED_VOCAB_SIZE - 1), min_size=1, max_size=20))
    stops = data.draw(st.lists(st.integers(3, USED_VOCAB_SIZE - 1), max_size=2))
    request = make_request("a", prompt, 24, seed=seed, stop_token_ids=stops, top_p=0.9, **penalty, **options)
    whole = make_core(ToyExecutor(num_kv_blocks=64, block_size=4))
    deltas = run(whole, [request]).deltas["a"]
    at = data.draw(st.integers(0, len(deltas) - 1))
    core = make_core(ToyExecutor(num_kv_blocks=16 if busy else 64, block_size=4))
    others = mixed_requests(5) if busy else []
    rest = run(core, [*others, split(request, [delta.token_ids[0] for delta in deltas[:at]])]).deltas["a"]
    for found, expected in zip(rest, deltas[at:], strict=True):
        assert replace(found, queued_seconds=0, num_cached_tokens=0) == replace(
            expected, queued_seconds=0, num_cached_tokens=0
        )
        assert found.num_cached_tokens <= len(prompt)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        ([7] * 8, {}),
        ([7] * 9, {}),
        ([7, EOS], {"ignore_eos": False}),
        ([7, 9], {"stop_token_ids": [9]}),
        ([7, VOCAB_SIZE], {}),
        ([-1, 7], {}),
    ],
)
def test_what_is_complete_or_no_output_is_not_gone_on_with(tokens: list[int], options: dict[str, object]) -> None:
    core = make_core(ToyExecutor(num_kv_blocks=16, block_size=4))
    with pytest.raises(RequestError) as refusal:
        core.add(split(make_request("a", [5, 6], 8, **options), tokens))
    assert refusal.value.field == "output_token_ids"
    assert not core.has_work()
    core.add(split(make_request("a", [5, 6], 8, ignore_eos=False, min_tokens=2), [7, EOS]))  # one that didn't count


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


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    num_kv_blocks=st.integers(13, 40),
    max_num_batched_tokens=st.integers(1, 40),
    max_prompt_rows=st.integers(1, 30),
    enable_chunked_prefill=st.booleans(),
    enable_prefix_caching=st.booleans(),
)
def test_prompt_logprobs_are_those_of_a_plain_pass(
    prompts: list[int], num_kv_blocks: int, max_prompt_rows: int, **options: int | bool
) -> None:
    options["max_num_batched_tokens"] = max(
        options["max_num_batched_tokens"], 40 * (not options["enable_chunked_prefill"])
    )
    core = make_core(ToyExecutor(num_kv_blocks=num_kv_blocks, block_size=4), **options)
    core.scheduler.max_prompt_rows = max_prompt_rows
    stem = random.Random(4).choices(range(3, USED_VOCAB_SIZE), k=40)
    asked = [make_request(f"p{i}", stem[:length], 8, prompt_logprobs=i) for i, length in enumerate(prompts)]
    plain = [make_request(f"n{i}", stem[:length], 8) for i, length in enumerate(prompts)]
    found = run(core, [request for pair in zip(plain, asked, strict=True) for request in pair])
    for i, (request, other) in enumerate(zip(asked, plain, strict=True)):
        name, prompt = request.request_id, request.prompt_token_ids
        assert found.token_ids[name] == found.token_ids[other.request_id]
        first, *later = found.deltas[name]
        assert [delta.prompt_logprobs for delta in later] == [None] * len(later)
        assert first.prompt_logprobs is not None
        assert first.prompt_logprobs[0] is None
        assert len(first.prompt_logprobs) == len(prompt)
        assert found.deltas[other.request_id][0].prompt_logprobs is None
        for at, entry in enumerate(first.prompt_logprobs[1:], start=1):
            assert entry is not None
            expected = toy_logits(np.array(prompt[:at]))[:USED_VOCAB_SIZE].log_softmax(-1)
            assert entry.token_id == prompt[at]
            assert entry.logprob == pytest.approx(expected[prompt[at]].item(), abs=1e-5)
            assert entry.rank == 1 + int((expected > expected[prompt[at]]).sum())
            assert list(entry.top) == expected.topk(i).indices.tolist()


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


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A small random mixture of experts, saved by transformers; its weights are large, so that wrong ones show."""
    torch.manual_seed(0)
    fields = {"vocab_size": 71, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    experts = {"moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1}
    model = Ernie4_5_MoeForCausalLM(
        Ernie4_5_MoeConfig(**fields, **heads, **experts, moe_layer_start_index=1, initializer_range=0.2)
    ).eval()
    folder = tmp_path_factory.mktemp("random-model")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("options", [{}, {"enable_prefix_caching": False}, {"enable_chunked_prefill": False}])
def test_a_real_model_under_preemption_says_what_transformers_says(
    random_model: tuple[Path, PreTrainedModel], options: dict[str, bool]
) -> None:
    folder, reference = random_model
    model = ModelConfig.from_folder(folder)
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        dtype="float32",
        num_threads=1,
        max_model_len=48,
        block_size=4,
        num_kv_blocks=12,
        max_num_seqs=5,
        max_num_batched_tokens=20,
        **options,  # type: ignore[arg-type]
    )
    core = EngineCore(
        config,
        model,
        Executor.start_local(config, model),
        used_vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
    )
    draw = random.Random(3)
    stem = [draw.randrange(3, 71) for _ in range(12)]
    requests = [
        make_request(f"r{i}", [*stem[: draw.randrange(1, 12)], draw.randrange(3, 71)], draw.randrange(4, 20))
        for i in range(10)
    ]
    together = run(core, requests)
    assert together.preemptions > 0
    for request in requests:
        prompt, name = request.prompt_token_ids, request.request_id
        assert together.token_ids[name] == run(core, [request]).token_ids[name]
        expected = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=request.max_tokens, eos_token_id=-1, pad_token_id=0
        )
        assert together.token_ids[name] == expected[0, len(prompt) :].tolist()
    core.shutdown()
