"""A rotated model computes the same function."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from engine.checkpoint.loader import ShardedWeights
from engine.compress.rotation import RotatedWeights, orthogonal
from engine.config import ModelConfig
from engine.errors import UnsupportedError
from engine.execution.batch import dummy_step
from engine.execution.kv_cache import allocate
from engine.execution.parallel import TensorParallelGroup
from engine.execution.runner import ModelRunner
from engine.layers.weights import WeightSource
from engine.models import build_model

CPU = torch.device("cpu")


def source(folder) -> tuple[ShardedWeights, ModelConfig]:
    config = ModelConfig.from_folder(folder)
    return ShardedWeights(folder, config, rank=0, world_size=1, dtype=torch.float32, device=CPU), config


def logits(weights: WeightSource, config: ModelConfig) -> torch.Tensor:
    model = build_model(config, weights, TensorParallelGroup(0, 1), dtype=torch.float32, device=CPU)
    cache = allocate(config, config.num_key_value_heads, num_blocks=1, block_size=17, dtype=torch.float32, device=CPU)
    tokens = torch.randint(0, config.vocab_size, (17,), generator=torch.Generator().manual_seed(1))
    step = dataclasses.replace(
        dummy_step(17, 1, 17), token_ids=tokens.int().numpy(), logits_rows=np.arange(17, dtype=np.int32)
    )
    out = ModelRunner(model, cache, dtype=torch.float32, device=CPU).run(step)
    assert out is not None
    return out


@pytest.mark.parametrize("name", ["moe-no-bias", "moe-no-shared", "qwen2-untied-odd-vocabulary"])
def test_the_function_is_the_same(random_checkpoint, name):
    weights, config = source(random_checkpoint(name)[0])
    expected = logits(weights, config)
    rotated = RotatedWeights(weights, config, orthogonal(config.hidden_size, seed=0, device=CPU))
    assert expected.abs().max() > 0.1
    assert (logits(rotated, config) - expected).abs().max() < 1e-4
    difference = rotated.embedding() - weights.embedding()
    assert difference.abs().max() > 0.1 * weights.embedding().abs().max(), "it is another basis"


def test_a_tied_head_is_refused(random_checkpoint):
    weights, config = source(random_checkpoint("qwen2-tied")[0])
    with pytest.raises(UnsupportedError, match="tie_word_embeddings"):
        RotatedWeights(weights, config, orthogonal(config.hidden_size, seed=0, device=CPU))


def test_the_same_seed_gives_the_same_rotation():
    one, other = (orthogonal(48, seed=3, device=CPU) for _ in range(2))
    assert torch.equal(one, other)
    assert (one @ one.T - torch.eye(48)).abs().max() < 1e-5
