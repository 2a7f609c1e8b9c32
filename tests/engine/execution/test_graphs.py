"""Decode steps in captured sizes compute what steps of their own size compute."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flat_batches import Cache, part, step
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.execution.batch import StepInput, dummy_step
from engine.execution.executor import Executor
from engine.execution.graphs import DecodeGraphs, capture_sizes
from engine.execution.messages import decode_step, encode_step
from engine.execution.padding import DecodeBuffers, choose_size, is_decode, pad
from engine.execution.worker import Worker

BLOCK_SIZE = 8
SIZES = (1, 2, 4, 8)
TOLERANCE = {"rtol": 0, "atol": 2e-5}


class Again:
    """In place of a CUDA graph: runs once, then does the same again on the same memory."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


class GraphWorker(Worker):
    """A worker on the CPU whose runner captures as one on a GPU does."""

    def connect(self, check: Callable[[], None] | None = None) -> None:
        super().connect(check)
        assert self._runner is not None
        self._runner.capture(Again(), SIZES, max_blocks=self._max_blocks)


@pytest.fixture(scope="module")
def workers(random_checkpoint):
    folder, _ = random_checkpoint("moe-two-shared-old-rope")
    config = EngineConfig(
        model=str(folder), device="cpu", max_model_len=256, max_num_seqs=8, block_size=BLOCK_SIZE, num_threads=1
    )
    model = ModelConfig.from_folder(folder)
    made = [Worker(config, model), GraphWorker(config, model)]
    for worker in made:
        worker.initialize()
    yield made
    for worker in made:
        worker.close()


def decodes(contexts: list[int], seed: int = 0) -> StepInput:
    """One token each of sequences of these lengths, with blocks of their own."""
    chance = random.Random(seed)
    blocks = iter(chance.sample(range(1, 200), sum(-(-c // BLOCK_SIZE) for c in contexts)))
    tables = np.zeros((len(contexts), max(-(-c // BLOCK_SIZE) for c in contexts)), dtype=np.int32)
    for r, context in enumerate(contexts):
        for b in range(-(-context // BLOCK_SIZE)):
            tables[r, b] = next(blocks)
    positions = np.array(contexts, dtype=np.int32) - 1
    last = tables[np.arange(len(contexts)), positions // BLOCK_SIZE].astype(np.int64)
    return StepInput(
        token_ids=np.array([chance.randrange(64) for _ in contexts], dtype=np.int32),
        positions=positions,
        slot_mapping=last * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_tables=tables,
        query_start=np.arange(len(contexts) + 1, dtype=np.int32),
        context_lens=np.array(contexts, dtype=np.int32),
        logits_rows=np.arange(len(contexts), dtype=np.int32),
    )


@settings(deadline=None)
@given(st.integers(1, 2000))
def test_sizes_cover_every_batch_that_is_worth_it(max_num_seqs):
    sizes = capture_sizes(max_num_seqs)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, 512)
    for count in range(1, sizes[-1] + 1):
        size = choose_size(count, sizes)
        assert size is not None
        assert count <= size < count + 8
    assert choose_size(sizes[-1] + 1, sizes) is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 5))
def test_padding_leaves_the_requests_alone(contexts, extra):
    inputs = decodes(contexts)
    count, size = len(contexts), len(contexts) + extra
    padded = pad(inputs, size, block=255, block_size=BLOCK_SIZE)
    for name in ("token_ids", "positions", "slot_mapping", "context_lens"):
        array = getattr(padded, name)
        assert array.dtype == getattr(inputs, name).dtype
        assert len(array) == size
        assert (array[:count] == getattr(inputs, name)).all()
    assert (padded.block_tables[:count] == inputs.block_tables).all()
    assert padded.query_start.tolist() == list(range(size + 1))
    assert padded.logits_rows.tolist() == list(range(count))
    # What is left is one token of a sequence of one, in a block that is nobody's.
    assert (padded.slot_mapping[count:] == 255 * BLOCK_SIZE).all()
    assert (padded.block_tables[count:, 0] == 255).all()
    assert not padded.positions[count:].any()
    assert (padded.context_lens[count:] == 1).all()


def test_only_steps_of_one_token_a_request_are_decode_steps():
    assert is_decode(decodes([3, 9]))
    assert is_decode(dummy_step(4, 4, BLOCK_SIZE))
    assert not is_decode(dummy_step(5, 4, BLOCK_SIZE))


def test_buffers_start_as_padding_and_hold_the_last_step():
    buffers = DecodeBuffers(4, 6, block=9, block_size=BLOCK_SIZE, device=torch.device("cpu"))
    batch = buffers.view(3)
    assert batch.slot_mapping.tolist() == [72] * 3
    assert batch.block_tables[:, 0].tolist() == [9] * 3
    assert batch.context_lens.tolist() == [1] * 3
    inputs = pad(decodes([3, 30]), 3, block=9, block_size=BLOCK_SIZE)
    addresses = [getattr(batch, name).data_ptr() for name in batch.__slots__]
    buffers.load(inputs)
    for name in ("token_ids", "positions", "slot_mapping", "context_lens", "query_start"):
        assert getattr(batch, name).tolist() == getattr(inputs, name).tolist()
    assert batch.block_tables[:, : inputs.block_tables.shape[1]].tolist() == inputs.block_tables.tolist()
    assert addresses == [getattr(buffers.view(3), name).data_ptr() for name in batch.__slots__]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8])
def test_replayed_steps_compute_what_eager_ones_do(workers, count):
    eager, graphed = workers
    for round_ in range(3):
        contexts = [random.Random(count * 10 + round_ + i).randint(1, 100) for i in range(count)]
        inputs = decodes(contexts, seed=round_)
        assert graphed._runner.graphs.size_for(inputs) == choose_size(count, SIZES)
        torch.testing.assert_close(graphed.execute(inputs), eager.execute(inputs), **TOLERANCE)
    for mine, theirs in zip(graphed._runner.cache.layers, eager._runner.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys[:-1], theirs.keys[:-1], **TOLERANCE)


def test_every_rank_takes_the_size_from_the_message(workers):
    graphs = workers[1]._runner.graphs
    for inputs in (decodes([3]), decodes([4, 70, 9]), decodes([2] * 9), dummy_step(20, 3, BLOCK_SIZE)):
        received = decode_step(encode_step(inputs))
        assert graphs.size_for(received) == graphs.size_for(inputs)


def test_only_the_rows_that_are_asked_for_come_back(workers):
    eager, graphed = workers
    inputs = replace(decodes([4, 20, 33]), logits_rows=np.array([0, 2], dtype=np.int32))
    torch.testing.assert_close(graphed.execute(inputs), eager.execute(inputs), **TOLERANCE)
    nothing = replace(inputs, logits_rows=np.array([], dtype=np.int32))
    assert graphed.execute(nothing).shape == (0, 64)


def test_what_does_not_fit_a_graph_runs_without_one(workers):
    eager, graphed = workers
    for inputs in (decodes([2] * 9), dummy_step(20, 3, BLOCK_SIZE)):
        assert graphed._runner.graphs.size_for(inputs) is None
        torch.testing.assert_close(graphed.execute(inputs), eager.execute(inputs), **TOLERANCE)


def test_a_whole_conversation_in_changing_company(workers):
    """Prefill without a graph, decode with one, requests come and go: as without graphs, step by step."""
    logits = []
    for worker in workers:
        executor, chance = Executor(worker), random.Random(5)
        executor.num_kv_blocks = min(w.num_kv_blocks for w in workers)
        cache = Cache(executor)
        requests = [cache.request([chance.randrange(64) for _ in range(30 + 9 * i)]) for i in range(6)]
        for i, request in enumerate(requests):
            step(executor, part(request, 10 + 3 * i))
        for turn in range(20):
            chosen = chance.sample(requests, 1 + turn % 6)
            logits.append(step(executor, *(part(request, 1) for request in chosen)))
    for mine, theirs in zip(logits[:20], logits[20:], strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


def test_what_cannot_be_captured_names_the_way_out():
    def forward(batch: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    buffers = DecodeBuffers(2, 1, block=0, block_size=1, device=torch.device("cpu"))
    graphs = DecodeGraphs(forward, buffers, sizes=(1, 2), max_blocks=1, block=0, block_size=1)
    with pytest.raises(ConfigError, match=r"2 requests can't be captured .*not permitted.* enforce_eager: true"):
        graphs.capture(Again())
    assert graphs.size_for(decodes([1])) is None


def test_largest_graphs_come_first_and_a_choice_of_them_is_enough():
    seen: list[int] = []

    def forward(batch: object) -> torch.Tensor:
        seen.append(len(batch.token_ids))
        return torch.zeros(len(batch.token_ids), 5)

    buffers = DecodeBuffers(8, 1, block=0, block_size=1, device=torch.device("cpu"))
    graphs = DecodeGraphs(forward, buffers, sizes=SIZES, max_blocks=1, block=0, block_size=1)
    graphs.capture(Again(), (4, 8))
    assert seen == [8, 4]
    inputs = build_step_input_of(3)
    assert graphs.size_for(inputs) == 4
    assert graphs.run(inputs, 4).shape == (3, 5)


def build_step_input_of(count: int) -> StepInput:
    return replace(dummy_step(count, count, 1), block_tables=np.zeros((count, 1), dtype=np.int32))


def test_an_eager_worker_captures_nothing(random_checkpoint):
    folder, _ = random_checkpoint("moe-two-shared-old-rope")
    config = EngineConfig(model=str(folder), device="cpu", max_model_len=256, num_threads=1, enforce_eager=True)
    eager = Worker(config, ModelConfig.from_folder(folder))
    eager.initialize()
    assert eager._runner.graphs is None
    assert eager.num_kv_blocks == eager._runner.cache.num_blocks
    eager.close()
