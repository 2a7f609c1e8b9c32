"""The cache is as large as the options say, or there is a clear error."""

from __future__ import annotations

import pytest
import torch

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.execution import kv_cache
from engine.execution.executor import Executor
from engine.execution.worker import Worker


@pytest.fixture(scope="module")
def folder(random_checkpoint):
    return random_checkpoint("dense-tied")[0]


@pytest.fixture(scope="module")
def model(folder):
    return ModelConfig.from_folder(folder)  # 2 layers, 2 kv heads of 8, 256 positions


def config(folder, **options) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", num_threads=1, **options)


BLOCK_BYTES = 2 * 2 * 16 * 2 * 8 * 4  # keys and values, layers, block_size, kv heads, head_dim, bytes of fp32


def test_bytes_of_a_block(model):
    assert kv_cache.block_bytes(model, 2, block_size=16, dtype=torch.float32) == BLOCK_BYTES
    assert kv_cache.block_bytes(model, 1, block_size=16, dtype=torch.bfloat16) == BLOCK_BYTES // 4


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"max_num_seqs": 3, "max_model_len": 100}, 3 * 7),
        ({"max_num_seqs": 3}, 3 * 16),
        ({"max_num_seqs": 3, "cpu_kv_cache_bytes": 20 * BLOCK_BYTES + 1}, 20),
        ({"max_num_seqs": 3, "num_kv_blocks": 17}, 17),
    ],
)
def test_number_of_blocks_on_a_cpu(folder, model, options, blocks):
    executor = Executor.start_local(config(folder, **options), model)
    assert executor.num_kv_blocks == blocks
    assert executor.block_size == 16
    assert executor.vocab_size == model.vocab_size
    assert executor.max_model_len == options.get("max_model_len", 256)
    executor.shutdown()


@pytest.mark.parametrize(
    "options",
    [{"num_kv_blocks": 15}, {"cpu_kv_cache_bytes": 16 * BLOCK_BYTES - 1}, {"cpu_kv_cache_bytes": 1}],
)
def test_a_cache_too_small_for_one_sequence_is_refused(folder, model, options):
    (name, value), *_ = options.items()
    with pytest.raises(ConfigError, match=rf"{name} {value}.* max_model_len 256 needs 16 .*lower max_model_len"):
        Executor.start_local(config(folder, **options), model)


def test_one_sequence_and_no_more_is_enough(folder, model):
    Executor.start_local(config(folder, num_kv_blocks=16), model).shutdown()


def test_more_than_the_memory_is_refused(folder, model):
    with pytest.raises(ConfigError, match=r"no memory for a KV cache of 9\d* blocks, .* GiB .*lower num_kv_blocks"):
        Executor.start_local(config(folder, num_kv_blocks=9 * 10**11), model)


def test_a_cpu_cache_costs_memory_only_where_it_is_used(model):
    resident = _resident_bytes()
    cache = kv_cache.allocate(
        model, 2, num_blocks=2**30 // BLOCK_BYTES, block_size=16, dtype=torch.float32, device=torch.device("cpu")
    )
    assert _resident_bytes() - resident < 2**27
    assert not cache.layers[0].keys[5].any()


def test_gpu_formula():
    options = EngineConfig(model="m", gpu_memory_utilization=0.5)
    assert kv_cache.blocks_on_gpu(options, 10, total=1000, used=200, activations=105) == 19
    assert kv_cache.blocks_on_gpu(options, 10, total=1000, used=600, activations=0) == 0


def test_sequences_longer_than_the_model_was_made_for_are_refused(folder, model):
    with pytest.raises(ConfigError, match="max_model_len 257 exceeds the model's max_position_embeddings 256"):
        Worker(config(folder, max_model_len=257), model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder, model):
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        Worker(EngineConfig(model=str(folder), device="cuda"), model)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
