"""A GPU's share of a model without a GPU: prepared for the Triton kernels, then moved to the meta device.

Tensors there have shapes and no values, so whatever asks for a value fails; launches of kernels do nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from benchmarks.random_weights import RandomWeights
from engine.config import ModelConfig
from engine.execution import kv_cache
from engine.execution.parallel import TensorParallelGroup
from engine.models import DecoderModel, build_model
from engine.planning.layouts import Layout
from kernels import gpu, ops

CPU, META = torch.device("cpu"), torch.device("meta")
BLOCK_SIZE = 16
BLOCKS = 64


def gpu_decoder(model: ModelConfig, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> DecoderModel:
    """A decoder with random weights as `kernels.gpu` keeps them, on the CPU still."""
    monkeypatch.setattr(ops, "_kernels", lambda device: gpu)
    weights = RandomWeights(model, layout.formats, device=CPU, dtype=torch.bfloat16, one_codebook=layout.one_codebook)
    with torch.inference_mode():
        return build_model(
            model,
            weights,
            TensorParallelGroup(0, 1),
            dtype=torch.bfloat16,
            device=CPU,
            quantize_embeddings=layout.embeddings,
        )


def make_cache(model: ModelConfig, dtype: torch.dtype) -> kv_cache.KVCache:
    """Of `BLOCKS` blocks, on the meta device."""
    return kv_cache.allocate(
        model, model.num_key_value_heads, num_blocks=BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device=META
    )


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


def step(
    decoder: DecoderModel,
    cache: kv_cache.KVCache,
    counts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> Tensor:
    """Logits of a step of a decoder on the meta device: so many tokens of each request, and no context before them."""
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *args, **options: None)
    requests, tokens = len(counts), sum(counts)
    if max(counts) == 1:
        metadata = ops.decode_metadata(
            _int32(requests, 4),
            _int32(requests + 1),
            _int32(requests),
            block_size=BLOCK_SIZE,
            dtype=torch.bfloat16,
        )
    else:
        starts = np.cumsum([0, *counts], dtype=np.int32)
        metadata = ops.attention_metadata(
            np.zeros((requests, -(-max(counts) // BLOCK_SIZE)), dtype=np.int32),
            starts,
            np.diff(starts),
            block_size=BLOCK_SIZE,
            dtype=torch.bfloat16,
            device=META,
        )
    with torch.inference_mode():
        logits = decoder(
            _int32(tokens),
            _int32(tokens),
            cache.layers,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=META),
            metadata=metadata,
            logits_rows=_int32(requests),
        )
    if logits is None:
        raise RuntimeError("the only rank has the logits")
    return logits


def _int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=META)


def held_bytes(value: Any) -> int:
    """Of the storages of all tensors in it, each counted once."""
    return sum({storage._cdata: storage.nbytes() for storage in _storages(value)}.values())


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _storages(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _storages(getattr(value, field.name))
    elif type(value).__module__.startswith(("engine.", "kernels.")) and hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _storages(item)
