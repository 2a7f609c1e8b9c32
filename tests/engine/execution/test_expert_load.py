"""Tokens of each expert: every routed token counted once, in every kind of step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flat_batches import Cache, part, step

from engine.config import EngineConfig, ModelConfig
from engine.execution.executor import Executor
from engine.execution.worker import Worker
from kernels import ops

NAME = "moe-two-shared-old-rope"


class Again:
    """In place of a CUDA graph: runs once, then does the same again on the same memory."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


class GraphWorker(Worker):
    """A worker on the CPU whose runner captures as one on a GPU does."""

    def _capture(self, runner):
        runner.capture(Again(), (1, 4), max_blocks=self._max_blocks)


def make(folder, *, expert_load: bool = True, kind: type[Worker] = Worker) -> tuple[Worker, Executor, ModelConfig]:
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        max_model_len=64,
        max_num_seqs=4,
        block_size=8,
        num_threads=1,
        expert_load=expert_load,
    )
    model = ModelConfig.from_folder(folder)
    worker = kind(config, model)
    worker.initialize()
    return worker, Executor(worker, None), model


def watch(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The expert ids of every routing from now on: [tokens, k] each."""
    seen: list[torch.Tensor] = []
    route = ops.route

    def watched(*args, **kwargs):
        weights, ids = route(*args, **kwargs)
        seen.append(ids.clone())
        return weights, ids

    monkeypatch.setattr(ops, "route", watched)
    return seen


def test_counts_what_was_routed(random_checkpoint, monkeypatch):
    folder, _ = random_checkpoint(NAME)
    worker, executor, model = make(folder)
    layers = [layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer)]
    assert worker.expert_load() == {layer: [0] * model.moe.num_experts for layer in layers}
    seen = watch(monkeypatch)
    cache = Cache(executor)
    one, other = cache.request(range(1, 20)), cache.request(range(30, 40))
    step(executor, part(one, 12))
    step(executor, part(one, 7), part(other, 9))
    step(executor, part(other, 1))
    expected = {layer: torch.zeros(model.moe.num_experts, dtype=torch.int64) for layer in layers}
    for i, ids in enumerate(seen):
        expected[layers[i % len(layers)]] += ids.flatten().bincount(minlength=model.moe.num_experts)
    assert worker.expert_load() == {layer: counts.tolist() for layer, counts in expected.items()}
    tokens = 29 * model.moe.num_experts_per_token
    assert all(sum(counts) == tokens for counts in worker.expert_load().values())
    executor.shutdown()
    assert worker.expert_load() is None


def test_a_replayed_step_counts_too_with_its_padding(random_checkpoint):
    folder, _ = random_checkpoint(NAME)
    worker, executor, model = make(folder, kind=GraphWorker)
    assert not any(sum(counts) for counts in worker.expert_load().values())  # what capturing ran is not counted
    cache = Cache(executor)
    requests = [cache.request([7]) for _ in range(3)]
    for _ in range(2):
        for request in requests:
            request.num_computed_tokens = 0
        step(executor, *(part(request, 1) for request in requests))
    tokens = 2 * 4 * model.moe.num_experts_per_token  # three requests in a graph of four
    assert all(sum(counts) == tokens for counts in worker.expert_load().values())
    executor.shutdown()


def test_off_by_default(random_checkpoint):
    folder, _ = random_checkpoint(NAME)
    worker, executor, _ = make(folder, expert_load=False)
    assert worker.expert_load() is None
    executor.shutdown()


def test_a_dense_model_has_no_experts(random_checkpoint):
    folder, _ = random_checkpoint("dense-tied")
    worker, executor, _ = make(folder)
    assert worker.expert_load() == {}
    executor.shutdown()
