"""Tensor parallelism costs one sum over the ranks after attention and one after the feed-forward, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from engine.checkpoint.loader import ShardedWeights
from engine.config import ModelConfig
from engine.execution import kv_cache
from engine.execution.batch import dummy_step
from engine.execution.parallel import TensorParallelGroup
from engine.execution.runner import ModelRunner
from engine.models import build_model

CPU = torch.device("cpu")
OTHERS = (
    "all_gather", "all_gather_into_tensor", "all_to_all", "all_to_all_single", "barrier", "broadcast", "isend", "irecv",
    "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("quantize_embeddings", [None, "int8"])
@pytest.mark.parametrize("name", ["moe-two-shared-old-rope", "qwen2-tied"])
def test_two_sums_a_layer(random_checkpoint, monkeypatch, name, quantize_embeddings, tokens):
    folder, _ = random_checkpoint(name)
    config = ModelConfig.from_folder(folder)
    group = TensorParallelGroup(0, 2)
    weights = ShardedWeights(folder, config, rank=0, world_size=2, dtype=torch.float32, device=CPU)
    model = build_model(
        config, weights, group, dtype=torch.float32, device=CPU, quantize_embeddings=quantize_embeddings
    )
    kv_heads = config.num_key_value_heads // 2
    cache = kv_cache.allocate(config, kv_heads, num_blocks=4, block_size=16, dtype=torch.float32, device=CPU)
    count: Counter[str] = Counter()
    shapes = []

    def all_reduce(x: torch.Tensor) -> None:
        count["all_reduce"] += 1
        shapes.append(tuple(x.shape))

    def gather(x: torch.Tensor, parts: list[torch.Tensor] | None) -> None:
        count["gather"] += 1
        assert parts is not None
        for part in parts:
            part.copy_(x)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "gather", gather)
    for other in OTHERS:
        monkeypatch.setattr(dist, other, lambda *args, other=other, **options: count.update([other]))
    logits = ModelRunner(model, cache, dtype=torch.float32, device=CPU).run(dummy_step(tokens, 1, 16))
    assert logits is not None
    # One more for the embedding, whose rows are dealt among the ranks; the logits are gathered once.
    assert count == {"all_reduce": 2 * config.num_hidden_layers + 1, "gather": 1}
    assert set(shapes) == {(tokens, config.hidden_size)}
