"""Logits are those of transformers, whatever the configuration and the number of ranks."""

from __future__ import annotations

import pytest
import torch
from flat_batches import all_logits
from random_checkpoints import VARIANTS
from torch import Tensor
from transformers import PreTrainedModel

from engine.config import EngineConfig, ModelConfig
from engine.errors import UnsupportedError
from engine.execution.executor import Executor
from engine.execution.worker import Worker

TOLERANCE = 1e-4
CASES = [(variant.name, size) for variant in VARIANTS for size in variant.tensor_parallel_sizes]


def engine_config(folder, size: int = 1) -> EngineConfig:
    return EngineConfig(
        model=str(folder), tensor_parallel_size=size, device="cpu", max_model_len=64, max_num_seqs=4, block_size=4,
        num_threads=1,
    )  # fmt: skip


def prompt(model: PreTrainedModel, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()


def expected(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize(("name", "size"), CASES, ids=[f"{name}-tp{size}" for name, size in CASES])
def test_logits_are_those_of_transformers(random_checkpoint, rank_pool, name, size):
    folder, model = random_checkpoint(name)
    token_ids = prompt(model, 23)
    with rank_pool.executor(engine_config(folder, size)) as executor:
        whole = all_logits(executor, token_ids)
        chunked = all_logits(executor, token_ids, chunks=[9, 1, 7, 1, 1, 4])
    reference = expected(model, token_ids)
    assert reference.abs().max() > 0.5, "logits near zero compare nothing"
    assert whole.shape == reference.shape
    assert whole.dtype == torch.float32
    assert (whole - reference).abs().max() <= TOLERANCE
    assert (chunked - reference).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["moe-two-shared-old-rope", "qwen2-tied"])
def test_greedy_tokens_are_those_of_transformers(random_checkpoint, name):
    folder, model = random_checkpoint(name)
    start = prompt(model, 5)
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor([start]), max_new_tokens=30, min_new_tokens=30, do_sample=False, eos_token_id=None
        )[0].tolist()
    executor = Executor.start_local(engine_config(folder), ModelConfig.from_folder(folder))
    logits = all_logits(executor, generated[:-1], chunks=[len(start)] + [1] * 29)
    executor.shutdown()
    assert logits[len(start) - 1 :].argmax(dim=-1).tolist() == generated[len(start) :]


@pytest.mark.parametrize("size", [2, 4])
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(random_checkpoint, size):
    folder, _ = random_checkpoint("dense-indivisible")
    with pytest.raises(UnsupportedError, match=rf"tensor_parallel_size {size} .*sizes that work: 1, 3"):
        Worker(engine_config(folder, size), ModelConfig.from_folder(folder), world_size=size, rendezvous="tcp://x:1")
