"""What a request gets does not depend on what else runs, on preemption, or on the engine where it goes on."""

from __future__ import annotations

import random
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
    ToyExecutor,
    alone,
    make_core,
    make_request,
    mixed_requests,
    run,
    toy_logits,
)
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedModel

from engine.config import EngineConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import RequestError
from engine.execution.executor import Executor
from engine.messages import EngineRequest


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny


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
