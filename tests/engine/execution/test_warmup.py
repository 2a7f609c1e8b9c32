"""After the warm-up no step, whatever its size, launches a kernel that Triton would have to compile first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_keys import Key, MetaRunner, make_runner, no_device, recorded_launches, share_of
from on_meta import META

from benchmarks.scales import MODELS
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.execution.batch import StepInput, dummy_step, nobodys_step
from engine.execution.graphs import capture_sizes
from engine.execution.warmup import warm_up, warmup_steps
from engine.planning.families import FAMILIES
from engine.planning.layouts import Layout, find_layout
from engine.quantization.bf16 import Bf16
from engine.quantization.bitplane import Bitplane
from engine.quantization.config import PARTS, QuantizationConfig, Rule
from engine.quantization.gptq import Gptq
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8
from engine.scheduling.scheduler import MAX_PROMPT_ROWS
from kernels import choice
from kernels.choice import Backend

torch.set_num_threads(1)

MAX_MODEL_LEN = 20_000
NUM_BLOCKS = 1500
"""More than a sequence of the greatest length, fewer than all."""


@pytest.fixture(autouse=True)
def gpu_without_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    backend = choice.backend
    monkeypatch.setattr(choice, "backend", lambda device: Backend("gpu", "") if device == META else backend(device))
    with no_device():
        yield


class Again:
    """In place of a CUDA graph: runs once."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


def limits(tokens: int, seqs: int) -> EngineConfig:
    return EngineConfig(model="", max_num_batched_tokens=tokens, max_num_seqs=seqs)


def steps_for(config: EngineConfig, model: ModelConfig, max_model_len: int = MAX_MODEL_LEN) -> list[StepInput]:
    return warmup_steps(config, model, META, max_model_len=max_model_len, num_blocks=NUM_BLOCKS)


def launches(runner: MetaRunner, steps: Sequence[StepInput]) -> set[Key]:
    with recorded_launches() as seen:
        for step in steps:
            runner.run(step)
    return seen


def captured(runner: MetaRunner, config: EngineConfig) -> set[Key]:
    """Launches of the decode steps that a worker captures."""
    with recorded_launches() as seen:
        runner.capture(Again(), capture_sizes(config.max_num_seqs), max_blocks=-(-MAX_MODEL_LEN // config.block_size))
    runner.graphs = None
    return seen


def random_step(chance: random.Random, config: EngineConfig, max_model_len: int = MAX_MODEL_LEN) -> StepInput:
    """Of requests that decode, of prompts or parts of prompts, or both; with any number of rows of logits."""
    kind = chance.choice(("decode", "prompts", "mixed"))
    budget = max(1, int(config.max_num_batched_tokens ** chance.random()))
    most = min(chance.randint(1, config.max_num_seqs), budget)
    counts: list[int] = []
    while budget > 0 and len(counts) < most:
        single = kind == "decode" or (kind == "mixed" and chance.random() < 0.7)
        counts.append(1 if single else min(chance.randint(1, budget), max_model_len))
        budget -= counts[-1]
    past = [int((max_model_len - count) * chance.random() ** 4) for count in counts]
    rows = chance.choice((0, 1, len(counts), min(sum(counts), config.max_num_seqs + MAX_PROMPT_ROWS)))
    return nobodys_step(counts, past=past, block_size=config.block_size, num_blocks=NUM_BLOCKS, num_rows=rows)


def shown(keys: set[Key]) -> str:
    return "\n".join(str(key) for key in sorted(keys, key=str))


@pytest.mark.parametrize(
    ("name", "layout", "ranks", "cache_dtype", "tokens", "seqs"),
    [
        ("ernie-4.5-300b-a47b", "wint2", 4, torch.int8, 2048, 64),
        ("ernie-4.5-300b-a47b", "wint2", 1, torch.bfloat16, 8192, 256),
        ("ernie-4.5-300b-a47b", "tight", 1, torch.int8, 1024, 8),
        ("ernie-4.5-300b-a47b", "tight", 4, torch.bfloat16, 2048, 1),
        ("ernie-4.5-21b-a3b", "wint2", 1, torch.bfloat16, 2048, 64),
        ("ernie-4.5-21b-a3b", "bf16", 4, torch.int8, 4096, 300),
        ("ernie-4.5-21b-a3b", "wint4", 2, torch.bfloat16, 64, 64),
        ("ernie-4.5-0.3b", "wint8", 1, torch.bfloat16, 300, 512),
        ("qwen2.5-72b", "bpdq", 4, torch.int8, 2048, 48),
    ],
)
def test_no_step_launches_what_the_warm_up_did_not(
    name: str, layout: str, ranks: int, cache_dtype: torch.dtype, tokens: int, seqs: int
) -> None:
    model = share_of(FAMILIES[name], ranks)
    runner = make_runner(model, find_layout(layout, model), cache_dtype=cache_dtype)
    config, chance = limits(tokens, seqs), random.Random(7)
    known = launches(runner, steps_for(config, model))
    seen = launches(runner, [random_step(chance, config) for _ in range(60)]) | captured(runner, config)
    seen |= launches(runner, [dummy_step(tokens, seqs, config.block_size)])
    assert seen <= known, shown(seen - known)


FORMATS = [Bf16(), Wint8(), Wint4(), *(Bitplane(planes, size) for planes in (2, 4) for size in (32, 64, 256))]
FORMATS += [Gptq(bits, size) for bits in (2, 4, 8) for size in (32, 128)]


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_whatever_the_formats_and_the_limits(data: Any) -> None:
    """Weights in two parts along K too, and shapes that fill no tile."""
    draw = data.draw
    model = MODELS["tiny"]
    experts = draw(st.integers(2, 70))
    group, kv_heads = draw(st.sampled_from([1, 3, 4, 20])), draw(st.integers(1, 4))
    moe = {"num_experts": experts, "num_experts_per_token": draw(st.integers(1, min(experts, 9)))}
    moe |= {"intermediate_size": 256 * draw(st.integers(1, 5)), "num_shared_experts": draw(st.integers(0, 1))}
    model = share_of(
        model.model_copy(
            update={
                "hidden_size": 256 * draw(st.integers(2, 9)), "head_dim": draw(st.sampled_from([64, 128, 256])),
                "num_attention_heads": group * kv_heads, "num_key_value_heads": kv_heads,
                "intermediate_size": 256 * draw(st.integers(1, 20)), "vocab_size": draw(st.integers(100, 60_000)),
                "moe": model.moe.model_copy(update=moe),
            }
        ),
        1,
    )  # fmt: skip
    chosen = {part: draw(st.sampled_from(FORMATS)) for part in PARTS}
    chosen["experts"] = draw(st.sampled_from([Wint2("plain"), *FORMATS]))
    formats = QuantizationConfig(tuple(Rule(part, chosen[part]) for part in PARTS))
    layout = Layout("", formats, draw(st.sampled_from([None, "int8", "int4"])), one_codebook=draw(st.booleans()))
    runner = make_runner(model, layout, split=draw(st.booleans()))
    config = limits(draw(st.integers(1, 3000)), draw(st.integers(1, 400)))
    max_model_len = draw(st.integers(1, MAX_MODEL_LEN))
    known = launches(runner, steps_for(config, model, max_model_len))
    chance = random.Random(draw(st.integers(0, 1 << 30)))
    seen = launches(runner, [random_step(chance, config, max_model_len) for _ in range(15)])
    assert seen <= known, shown(seen - known)


@pytest.fixture(scope="module")
def shared_rank() -> tuple[ModelConfig, Layout]:
    """Of four with the 300B, as Baidu's checkpoint has it."""
    model = share_of(FAMILIES["ernie-4.5-300b-a47b"], 4)
    return model, find_layout("wint2", model)


def test_every_number_of_tokens(shared_rank: tuple[ModelConfig, Layout]) -> None:
    model, layout = shared_rank
    runner, config = make_runner(model, layout), limits(140, 140)
    known = launches(runner, steps_for(config, model))
    for count in range(1, 141):
        seen = launches(runner, [dummy_step(count, seqs, config.block_size) for seqs in (1, count)])
        assert seen <= known, f"{count} tokens:\n{shown(seen - known)}"


def test_every_kind_of_step_is_needed(shared_rank: tuple[ModelConfig, Layout]) -> None:
    """The largest step leaves a first decode step a dozen kernels to compile; and no kind makes up for another."""
    model, layout = shared_rank
    runner, config = make_runner(model, layout), limits(2048, 64)
    steps = steps_for(config, model)
    known = launches(runner, steps)
    profiled = launches(runner, [dummy_step(2048, 64, config.block_size)])
    first = launches(runner, [dummy_step(1, 1, config.block_size)])
    assert len(first - profiled) >= 12
    assert known > profiled | captured(runner, config)
    assert len(steps) < 32
    kinds: dict[str, Callable[[StepInput], bool]] = {
        "large": lambda step: len(step.token_ids) > 16,
        "small": lambda step: 1 < len(step.token_ids) <= 16,
        "long contexts": lambda step: len(step.token_ids) == 1 and int(step.context_lens[0]) > 1,
    }
    for name, belongs in kinds.items():
        rest = [step for step in steps if not belongs(step)]
        assert len(rest) < len(steps)
        assert launches(runner, rest) < known, name


def test_no_memory_for_a_step_says_what_to_lower(shared_rank: tuple[ModelConfig, Layout]) -> None:
    class FullRunner(MetaRunner):
        def run(self, step: StepInput) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    cache = make_runner(*shared_rank).cache
    runner = FullRunner(None, cache, dtype=torch.bfloat16, device=META)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens 2048 and max_num_seqs 64 .*1500 blocks .*lower"):
        warm_up(runner, limits(2048, 64), shared_rank[0], max_model_len=MAX_MODEL_LEN, num_blocks=NUM_BLOCKS)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 3000), st.integers(1, 400))
def test_steps_keep_within_the_limits(tokens: int, seqs: int, max_model_len: int, num_blocks: int) -> None:
    """So they take no more memory than the steps of requests, and every rank makes the same ones."""
    model, config = MODELS["tiny"], limits(tokens, seqs)
    num_blocks = max(num_blocks, -(-max_model_len // config.block_size))
    steps = warmup_steps(config, model, META, max_model_len=max_model_len, num_blocks=num_blocks)
    largest = min(tokens, seqs * max_model_len, num_blocks * config.block_size)
    sizes = [len(step.token_ids) for step in steps]
    assert sizes[0] == largest == max(sizes)
    for step in steps:
        assert len(step.context_lens) <= seqs
        assert step.context_lens.max() <= -(-max_model_len // config.block_size) * config.block_size
        assert 0 <= step.block_tables.min() <= step.block_tables.max() < num_blocks
        assert 0 <= step.slot_mapping.min() <= step.slot_mapping.max() < num_blocks * config.block_size
        assert len(step.logits_rows) <= seqs + MAX_PROMPT_ROWS * (len(step.token_ids) <= seqs + MAX_PROMPT_ROWS)
        assert np.diff(step.query_start).min() >= 1
        assert np.diff(step.query_start).sum() == len(step.token_ids) == len(step.positions)
