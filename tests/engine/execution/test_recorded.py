"""On a CPU, decode steps that were recorded give the logits of steps that were not, to the bit."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from pathlib import Path

import pytest
import torch
from test_graphs import BLOCK_SIZE, decodes

from engine.config import EngineConfig, ModelConfig
from engine.execution.graphs import LARGEST_CPU_SIZE, cpu_sizes
from engine.execution.worker import Worker

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "ernie-tiny" / "2bits"


def worker(folder: Path, **options: object) -> Worker:
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        max_model_len=256,
        max_num_seqs=16,
        block_size=BLOCK_SIZE,
        num_threads=1,
        **options,
    )
    made = Worker(config, ModelConfig.from_folder(folder))
    made.initialize()
    return made


@pytest.fixture(scope="module")
def workers():
    made = [worker(EXAMPLE), worker(EXAMPLE, enforce_eager=True)]
    assert made[0].num_kv_blocks == made[1].num_kv_blocks
    yield made
    for each in made:
        each.close()


def test_sizes_need_no_padding():
    assert cpu_sizes(3) == (1, 2, 3)
    assert cpu_sizes(100) == tuple(range(1, LARGEST_CPU_SIZE + 1))


@pytest.mark.parametrize("requests", [1, 3, LARGEST_CPU_SIZE, LARGEST_CPU_SIZE + 1])
def test_logits_are_those_of_steps_that_were_not(workers, requests):
    recorded, eager = workers
    chance = random.Random(requests)
    for seed in range(3):
        step = decodes([chance.randint(1, 40) for _ in range(requests)], seed)
        expected = eager.execute(step)
        found = recorded.execute(step)
        assert expected is not None
        assert found is not None
        assert torch.equal(found, expected)


def test_a_model_that_can_not_be_recorded_runs_all_the_same(random_checkpoint, caplog):
    folder, _ = random_checkpoint("moe-two-shared-old-rope")  # dense experts
    with caplog.at_level(logging.INFO):
        made = worker(folder)
    try:
        assert "running without recorded steps" in caplog.text
        assert made.execute(decodes([5])) is not None
    finally:
        made.close()


def test_a_closed_worker_lets_go_at_once():
    """Not when the garbage collector happens to run: it knows nothing of the GPU memory that the next engine needs."""
    made = worker(EXAMPLE)
    assert made._runner is not None
    assert made._runner.graphs is not None
    held = [weakref.ref(made._decoder), weakref.ref(made._runner), weakref.ref(made._runner.cache.layers[0].keys)]
    gc.collect()
    gc.disable()
    try:
        made.close()
        assert [each() for each in held] == [None] * len(held)
    finally:
        gc.enable()
