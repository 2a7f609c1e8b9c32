"""A step on a GPU asks the device for nothing before its logits.

Tensors of the meta device have no values, so whatever asks for one fails; launches do nothing there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from benchmarks.random_weights import RandomWeights
from benchmarks.scales import MODELS, layout
from engine.execution import kv_cache
from engine.execution.parallel import TensorParallelGroup
from engine.models import build_model
from kernels import gpu, ops

CPU, META = torch.device("cpu"), torch.device("meta")
MODEL = MODELS["tiny"]


def to_meta(value: Any) -> Any:
    """The same with all tensors on the meta device; objects that are not frozen, in place."""
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, (tuple, list)):
        return type(value)(to_meta(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: to_meta(item) for name, item in held.items()})
    if type(value).__module__.startswith("engine.") and hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            setattr(value, name, to_meta(item))
    return value


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.setattr(ops, "_kernels", lambda device: gpu)
    chosen = layout("tight", MODEL)
    weights = RandomWeights(MODEL, chosen.formats, device=CPU, dtype=torch.bfloat16)
    with torch.inference_mode():
        model = build_model(
            MODEL,
            weights,
            TensorParallelGroup(0, 1),
            dtype=torch.bfloat16,
            device=CPU,
            quantize_embeddings=chosen.embeddings,
        )
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *args, **options: None)
    return to_meta(model)


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=META)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("counts", [[1], [1] * 64, [1, 7, 1], [300]], ids=len)
def test_a_step_needs_no_value_from_the_device(decoder, counts, cache_dtype):
    requests, tokens = len(counts), sum(counts)
    cache = kv_cache.allocate(
        MODEL, MODEL.num_key_value_heads, num_blocks=64, block_size=16, dtype=cache_dtype, device=META
    )
    if max(counts) == 1:
        metadata = ops.decode_metadata(
            int32(requests, 4), int32(requests + 1), int32(requests), block_size=16, dtype=torch.bfloat16
        )
    else:
        starts = np.cumsum([0, *counts], dtype=np.int32)
        metadata = ops.attention_metadata(
            np.zeros((requests, 20), dtype=np.int32),
            starts,
            np.diff(starts),
            block_size=16,
            dtype=torch.bfloat16,
            device=META,
        )
    with torch.inference_mode():
        logits = decoder(
            int32(tokens),
            int32(tokens),
            cache.layers,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=META),
            metadata=metadata,
            logits_rows=int32(requests),
        )
    assert logits.shape == (requests, MODEL.vocab_size)
    assert logits.device == META
