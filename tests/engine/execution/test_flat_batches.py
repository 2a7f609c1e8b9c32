"""What a request computes does not depend on how it is cut into steps, or on what shares its steps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from flat_batches import Cache, all_logits, part, step

from engine.config import EngineConfig, ModelConfig
from engine.execution.executor import Executor

TOLERANCE = {"rtol": 0, "atol": 2e-5}
VOCABULARY = 64


@pytest.fixture(scope="module")
def executor(random_checkpoint):
    folder, _ = random_checkpoint("moe-two-shared-old-rope")
    config = EngineConfig(
        model=str(folder), device="cpu", max_model_len=256, max_num_seqs=8, block_size=8, num_threads=1
    )
    executor = Executor.start_local(config, ModelConfig.from_folder(folder))
    yield executor
    executor.shutdown()


def tokens(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


@pytest.mark.parametrize("chunk", [1, 3, 8, 20, 64])
def test_chunks_of_any_size_give_the_logits_of_one_pass(executor, chunk):
    token_ids = tokens(100)
    chunks = [chunk] * (100 // chunk) + [100 % chunk] * bool(100 % chunk)
    torch.testing.assert_close(all_logits(executor, token_ids, chunks), all_logits(executor, token_ids), **TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_requests_in_one_batch_compute_what_each_computes_alone(executor, seed):
    chance = random.Random(seed)
    cache = Cache(executor)
    sequences = [tokens(chance.choice([1, 2, 9, 30, 90, 200]), seed * 100 + i) for i in range(6)]
    alone = [all_logits(executor, sequence) for sequence in sequences]
    requests = [cache.request(sequence) for sequence in sequences]
    waiting = list(range(6))
    while waiting:
        chosen = chance.sample(waiting, chance.randint(1, len(waiting)))
        parts = []
        for i in chosen:
            left = len(sequences[i]) - requests[i].num_computed_tokens
            parts.append(part(requests[i], min(left, chance.choice([1, 1, 2, 17, 60]))))
        logits = step(executor, *parts)
        for i, row in zip(chosen, logits, strict=True):
            torch.testing.assert_close(row, alone[i][requests[i].num_computed_tokens - 1], **TOLERANCE)
            if requests[i].num_computed_tokens == len(sequences[i]):
                waiting.remove(i)


def test_blocks_of_a_shared_prefix_serve_several_requests(executor):
    prefix, cache = tokens(24), Cache(executor)
    first = cache.request(prefix + tokens(10, 1))
    step(executor, part(first, 34))
    second = cache.request(prefix + tokens(10, 2))
    second.block_table[:3] = first.block_table[:3]
    second.num_computed_tokens = 24
    logits = step(executor, part(second, 10))
    torch.testing.assert_close(logits[0], all_logits(executor, second.all_token_ids)[-1], **TOLERANCE)


def test_a_step_that_samples_nothing_gives_no_rows(executor):
    cache = Cache(executor)
    request = cache.request(tokens(10))
    first = replace(part(request, 4), samples=False)
    assert step(executor, first).shape == (0, VOCABULARY)


def test_decoding_is_the_same_in_any_company(executor):
    """One decoding request beside 0 ... 7 others: within fp32 rounding, and so the same greedy token."""
    cache = Cache(executor)
    requests = [cache.request(tokens(60 + 20 * i, i)) for i in range(8)]
    for request in requests:
        step(executor, part(request, len(request.all_token_ids) - 1))
    rows = []
    for company in range(8):
        for request in requests:
            request.num_computed_tokens = len(request.all_token_ids) - 1
        rows.append(step(executor, *(part(request, 1) for request in requests[: company + 1]))[0])
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0], **TOLERANCE)
        assert row.argmax() == rows[0].argmax()
