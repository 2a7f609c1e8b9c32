"""When a GPU is too small, the message says what needs how much, and names only changes that suffice."""

from __future__ import annotations

import re

import pytest

from benchmarks.scales import MODELS
from engine.config import EngineConfig
from engine.execution.memory import CacheNeed, GpuMemory, shortage
from engine.quantization.vocabulary import savings

GB = 10**9
BLOCK = 16 * 221_184  # 16 tokens of ERNIE-4.5-300B-A47B in bf16
INT8_BLOCK = 16 * 112_320


def need(max_model_len: int) -> CacheNeed:
    return CacheNeed(max_model_len, BLOCK, INT8_BLOCK)


def ask(memory: GpuMemory, max_model_len: int, *, heads: int = 64, **options) -> str | None:
    return shortage(memory, need(max_model_len), EngineConfig(model="m", **options), rank=0, num_heads=heads)


H100 = GpuMemory(total=85 * GB, weights=70 * GB, other=GB, activations=2 * GB, graphs=GB)


def test_enough_is_no_problem():
    assert ask(H100, 8192) is None  # 1.8 GB of 2.5


def test_the_message_has_the_bytes_by_part():
    said = ask(H100, 32768) or ""
    for part in (
        "max_model_len 32768 needs 7.25 GB",
        "2.50 GB are left of 76.50 GB",
        "gpu_memory_utilization 0.9 of 85.00 GB",
        "weights 70.00 GB",
        "activations 2.00 GB",
        "CUDA graphs 1.00 GB",
        "other processes 1.00 GB",
    ):
        assert part in said


def test_every_remedy_works():
    """Each option that the message names makes the problem go away when it is followed."""
    said = ask(H100, 16384) or ""  # 3.62 GB, of which 1.12 are missing
    tokens = int(re.search(r"max_model_len (\d+) or less", said)[1])
    assert ask(H100, tokens) is None
    assert ask(H100, tokens + 16) is not None
    assert "kv_cache_dtype int8" in said
    assert need(16384).blocks(16) * INT8_BLOCK <= H100.left(0.9)
    utilization = float(re.search(r"gpu_memory_utilization (0\.\d\d)(?! of)", said.partition("would do")[2])[1])
    assert ask(H100, 16384, gpu_memory_utilization=utilization) is None
    assert ask(H100, 16384, gpu_memory_utilization=utilization - 0.01) is not None
    assert "tensor_parallel_size 2" in said
    batch = re.search(r"max_num_batched_tokens (\d+) with max_num_seqs (\d+)", said)
    assert int(batch[1]) < 2048
    assert int(batch[2]) < 64
    assert "enforce_eager" not in said  # 1.00 GB would not do


@pytest.mark.parametrize(("missing", "named"), [(0.9, True), (1.1, False)])
def test_graphs_are_given_up_only_where_that_is_enough(missing, named):
    needed = need(8192).blocks(16) * BLOCK
    memory = GpuMemory(
        total=100 * GB, weights=int(90 * GB - needed - 2 * GB + missing * GB), other=0, activations=GB, graphs=GB
    )
    assert ("enforce_eager true" in (ask(memory, 8192) or "")) == named
    assert "enforce_eager" not in (ask(memory, 8192, enforce_eager=True) or "")


def test_int8_is_not_proposed_twice_nor_ranks_that_do_not_divide_the_heads():
    said = ask(H100, 16384, kv_cache_dtype="int8", heads=3) or ""
    assert "kv_cache_dtype" not in said
    assert "tensor_parallel_size" not in said


@pytest.mark.parametrize(("missing", "named"), [(1.0, "int8"), (2.0, "int4"), (3.0, None)])
def test_tables_are_rounded_where_that_is_enough(missing, named):
    """The 300B's two tables, of 1.69 GB each in bf16."""
    saved = savings(MODELS["300b"], 1, None)
    assert {how: round(size / GB, 2) for how, size in saved.items()} == {"int8": 1.69, "int4": 2.5}
    needed = need(8192).blocks(16) * BLOCK
    memory = GpuMemory(total=100 * GB, weights=int(90 * GB - needed + missing * GB), other=0, activations=0, graphs=0)
    said = shortage(memory, need(8192), EngineConfig(model="m"), rank=0, num_heads=64, embedding_savings=saved) or ""
    assert ("quantize_embeddings" in said) == (named is not None)
    assert named is None or f"quantize_embeddings {named}" in said
    assert savings(MODELS["300b"], 1, "int8") == {}
    assert savings(MODELS["21b"], 2, None)["int8"] * 4 < saved["int8"]  # tied, and half of it


def test_where_nothing_helps_the_message_says_so():
    said = ask(GpuMemory(total=GB, weights=20 * GB, other=0, activations=0, graphs=0), 131072, heads=1) or ""
    assert "nothing short of a GPU with more memory" in said
    assert "0.00 GB are left" in said
