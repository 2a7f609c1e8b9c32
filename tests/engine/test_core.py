from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_executor import EOS, USED_VOCAB_SIZE, VOCAB_SIZE, Collector, ToyExecutor, make_core, make_request, run
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
