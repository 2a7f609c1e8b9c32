"""Token embedding and head in few bits: the bytes promised, the same for any number of ranks, near what they were."""

from __future__ import annotations

import pytest
import torch
from flat_batches import all_logits
from model_fixtures import random_checkpoint, rank_pool

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.execution.executor import Executor
from engine.quantization.vocabulary import round_table, table_bytes
from kernels.reference import dequantize

__all__ = ["random_checkpoint", "rank_pool"]


@pytest.mark.parametrize(("how", "bits", "error"), [("int8", 8, 0.01), ("int4", 4, 0.11)])
@pytest.mark.parametrize("hidden", [96, 256])
def test_a_table_takes_the_bytes_it_should_and_keeps_its_values(how, bits, error, hidden):
    table = torch.randn(50, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = round_table(table, how)
    tensors = [getattr(weight, name) for name in weight.__slots__]
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    assert size == table_bytes(50, hidden, how)
    assert size <= 50 * hidden * (bits + 0.76) / 8
    difference = dequantize(weight, torch.float32) - table.float()
    assert difference.norm() / table.float().norm() < error


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_rows_are_rounded_each_by_itself(how):
    table = torch.randn(40, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 2, 40).unsqueeze(1)
    table[7] = 0  # as in the vocabulary's padding
    whole = dequantize(round_table(table, how), torch.float32)
    halves = [dequantize(round_table(half, how), torch.float32) for half in table.split(20)]
    assert torch.equal(torch.cat(halves), whole)
    assert not whole[7].any()


def test_a_hidden_size_without_groups_is_refused():
    with pytest.raises(ConfigError, match="multiples of 32; the model's is 48"):
        round_table(torch.zeros(2, 48), "int4")


def config(folder, size: int, how: str | None) -> EngineConfig:
    return EngineConfig(
        model=str(folder), tensor_parallel_size=size, device="cpu", max_model_len=64, max_num_seqs=4, block_size=4,
        num_threads=1, quantize_embeddings=how,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["moe-two-shared-old-rope", "qwen2-tied"])
@pytest.mark.parametrize(("how", "change"), [("int8", 0.05), ("int4", 0.5)])
def test_logits_are_the_same_on_one_rank_and_two(random_checkpoint, rank_pool, name, how, change):
    folder, _ = random_checkpoint(name)
    token_ids = torch.randint(0, 64, (19,), generator=torch.Generator().manual_seed(3)).tolist()
    executor = Executor.start_local(config(folder, 1, how), ModelConfig.from_folder(folder))
    alone = all_logits(executor, token_ids)
    executor.shutdown()
    executor = Executor.start_local(config(folder, 1, None), ModelConfig.from_folder(folder))
    exact = all_logits(executor, token_ids)
    executor.shutdown()
    with rank_pool.executor(config(folder, 2, how)) as executor:
        together = all_logits(executor, token_ids)
    assert (alone - together).abs().max() <= 1e-4
    assert 0 < (alone - exact).norm() / exact.norm() < change
