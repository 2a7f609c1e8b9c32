"""A worker's start with the steps of a warm-up, run on a CPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from benchmarks.scales import MODELS
from engine.config import EngineConfig, ModelConfig
from engine.execution import warmup
from engine.execution.warmup import warmup_steps
from engine.execution.worker import Worker
from kernels import choice


def test_a_cpu_compiles_nothing_by_size() -> None:
    config, model = EngineConfig(model=""), MODELS["tiny"]
    assert warmup_steps(config, model, torch.device("cpu"), max_model_len=2048, num_blocks=200) == []


def test_a_worker_warms_up_before_it_records_and_leaves_no_trace(
    random_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "launch_sizes", lambda device, **bounds: choice.LaunchSizes((1, 3, 20), (64,), 17))
    monkeypatch.setattr(warmup, "PROGRESS_SECONDS", 0.0)
    folder, _ = random_checkpoint("moe-two-shared-old-rope")
    config = EngineConfig(
        model=str(folder), device="cpu", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=20, num_threads=1,
        expert_load=True,
    )  # fmt: skip
    worker = Worker(config, ModelConfig.from_folder(folder))
    with caplog.at_level(logging.INFO):
        worker.initialize()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("engine.execution")]
    first = said.index("compiling kernels: 1 of 5 steps")
    assert any(text.startswith("compiled kernels for steps of all sizes in ") for text in said[first:])
    assert any("decode step" in text for text in said[first:])
    assert not any("decode step" in text for text in said[:first])
    assert worker._runner is not None
    for layer in worker._runner.cache.layers:
        assert not layer.keys[:-1].any()  # the last block is the recorded steps'
        assert not layer.values[:-1].any()
    assert not any(sum(counts) for counts in worker.expert_load().values())
    worker.close()
