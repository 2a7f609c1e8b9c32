"""An int8 cache holds more tokens in the same memory, and changes the logits little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flat_batches import all_logits

from engine.config import EngineConfig, ModelConfig
from engine.execution import kv_cache
from engine.execution.executor import Executor
from engine.tokenizer import Tokenizer

TINY = Path(__file__).parents[3] / "examples" / "ernie-tiny" / "bf16"
TEXT = (
    "Once upon a time there was a small model that answered questions about the weather, the sea and the stars. "
    "A rolling stone gathers no moss, they say; but who has seen one roll? "
)


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_folder(TINY)  # 8 layers, 2 kv heads of 32


def start(model: ModelConfig, **options) -> Executor:
    config = EngineConfig(model=str(TINY), device="cpu", num_threads=1, max_model_len=256, **options)
    return Executor.start_local(config, model)


def test_logits_are_close_to_those_of_an_fp32_cache(model):
    """The root mean square of the changes stays below 2 % of the logits' deviation, and no distribution moves by more
    than 0.02 nats (Kullback-Leibler); a cache of 4 bits would be at ten times that."""
    token_ids = Tokenizer.from_folder(TINY).encode(TEXT)
    logits = {}
    for kind in ("auto", "int8"):
        executor = start(model, max_num_seqs=2, kv_cache_dtype=kind)
        logits[kind] = all_logits(executor, token_ids)
        if kind == "int8":  # written in one step or in many, it is the same cache
            chunked = all_logits(executor, token_ids, chunks=[20, 1, 1, len(token_ids) - 22])
        executor.shutdown()
    change = logits["int8"] - logits["auto"]
    assert change.abs().max() > 1e-3, "it was quantized"
    assert change.square().mean().sqrt() < 0.02 * logits["auto"].std()
    exact, rounded = (logits[kind].log_softmax(-1) for kind in ("auto", "int8"))
    assert (exact.exp() * (exact - rounded)).sum(-1).max() < 0.02
    assert (chunked - logits["int8"]).abs().max() < 1e-3


def test_the_same_memory_holds_more_blocks(model):
    blocks = {}
    for dtype, kind in (("float32", "auto"), ("bfloat16", "auto"), ("float32", "int8")):
        executor = start(model, max_num_seqs=64, dtype=dtype, kv_cache_dtype=kind, cpu_kv_cache_bytes=2**22)
        blocks[dtype if kind == "auto" else kind] = executor.num_kv_blocks
        executor.shutdown()
    # A token's keys of one head take 32 bytes and a scale of 2, in place of 128 and of 64.
    assert blocks["int8"] / blocks["float32"] == pytest.approx(128 / 34, rel=0.02)
    assert blocks["int8"] / blocks["bfloat16"] == pytest.approx(64 / 34, rel=0.02)


def test_bytes_of_a_token_of_the_300b_model(model):
    large = model.model_copy(update={"num_hidden_layers": 54, "num_key_value_heads": 8, "head_dim": 128})
    assert kv_cache.block_bytes(large, 8, block_size=1, dtype=torch.bfloat16) == 221_184
    assert kv_cache.block_bytes(large, 8, block_size=1, dtype=torch.int8) == 221_184 // 2 + 1_728


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_cache_takes_the_bytes_that_are_counted(model, dtype):
    cache = kv_cache.allocate(model, 2, num_blocks=3, block_size=16, dtype=dtype, device=torch.device("cpu"))
    counted = 3 * kv_cache.block_bytes(model, 2, block_size=16, dtype=dtype)
    assert sum(layer.num_bytes for layer in cache.layers) == counted
