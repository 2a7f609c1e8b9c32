"""What Triton would compile: the launches of steps on tensors that have no values, by its own rules."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from on_meta import BLOCK_SIZE, BLOCKS, META
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.random_weights import RandomWeights
from engine.config import ModelConfig
from engine.execution import kv_cache, padding
from engine.execution.parallel import TensorParallelGroup
from engine.execution.runner import ModelRunner
from engine.models import build_model
from engine.planning.layouts import Layout
from engine.quantization import vocabulary
from engine.quantization.bitplane import Bitplane
from engine.quantization.format import WeightFormat
from engine.quantization.gptq import Gptq
from kernels import gpu, ops
from kernels.gpu import assembly, pack
from kernels.gpu.packed import BLOCK
from kernels.operands import BitplaneWeight, GroupedWeight, SplitWeight, Weight

Key = tuple[object, ...]


class Pointer:
    """A tensor as a launch sees it: a GPU's allocations are aligned, so a view's offset says whether its address is."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


@functools.cache
def binder(kernel: InterpretedFunction) -> Any:
    """What Triton's launcher looks up whether it has compiled something already."""
    compiled = JITFunction(kernel.fn, **{name: value for name, value in kernel.kwargs.items() if value is not None})
    return create_function_from_signature(compiled.signature, compiled.params, make_backend(GPUTarget("cuda", 90, 32)))


def launch_key(kernel: InterpretedFunction, args: tuple[object, ...], options: dict[str, object]) -> Key:
    """Name; types, constants, and what integers and addresses are specialised by; warps and stages."""
    shown = [Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args]
    _, specialization, rest = binder(kernel)(*shown, **options)
    return kernel.fn.__name__, *specialization, *sorted(rest.items())


@contextmanager
def recorded_launches() -> Iterator[set[Key]]:
    """Launches do nothing but add their key."""
    seen: set[Key] = set()

    def record(kernel: InterpretedFunction, grid: object) -> Any:
        return lambda *args, **options: seen.add(launch_key(kernel, args, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__getitem__", record)
        yield seen


class MetaRunner(ModelRunner):
    """A runner whose device has no memory."""

    def _to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(META)


class MetaWeights(RandomWeights):
    """Weights of a shape, in any format; with `split`, as of two ranks' files side by side."""

    split = False

    def qkv_bias(self, layer: int) -> Tensor | None:
        width = (self._model.num_attention_heads + 2 * self._model.num_key_value_heads) * self._model.head_dim
        return torch.empty(width, dtype=self._dtype, device=META) if self._model.architecture == "qwen2" else None

    def _matrix(self, weight_format: WeightFormat, k: int, n: int, *, experts: int | None = None) -> Weight:
        if self.split and k < n:
            half = self._part(weight_format, k // 2, n, experts)
            return SplitWeight((half, half))
        return self._part(weight_format, k, n, experts)

    def _part(self, weight_format: WeightFormat, k: int, n: int, experts: int | None) -> Weight:
        def empty(rows: int, *shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((*(() if experts is None else (experts,)), rows, *shape), dtype=dtype, device=META)

        if isinstance(weight_format, Bitplane):
            planes, groups = weight_format.planes, k // math.gcd(k, weight_format.group_size)
            codes = empty(k // 32, planes, n, dtype=torch.int32)
            return BitplaneWeight(codes, empty(groups, planes + 1, n, dtype=torch.bfloat16))
        if isinstance(weight_format, Gptq):
            bits, groups = weight_format.bits, k // math.gcd(k, weight_format.group_size)
            codes, zeros = empty(k * bits // 32, n, dtype=torch.int32), empty(groups, n, dtype=torch.uint8)
            return GroupedWeight(codes, zeros, empty(groups, n, dtype=torch.float16), bits=bits)
        return super()._matrix(weight_format, k, n, experts=experts)


def share_of(model: ModelConfig, ranks: int) -> ModelConfig:
    """A model as large as the share of one of so many ranks, with a layer of each kind.

    Dense, and two with experts, whose formats may differ.
    """
    changes: dict[str, Any] = {
        "num_attention_heads": model.num_attention_heads // ranks,
        "num_key_value_heads": max(1, model.num_key_value_heads // ranks),
        "intermediate_size": model.intermediate_size // ranks,
        "vocab_size": model.vocab_size // ranks,
        "num_hidden_layers": 3 if model.moe else 1,
    }
    if model.moe is not None:
        width = model.moe.intermediate_size // ranks
        layers = {"layer_start_index": 1, "layer_end_index": 2}
        changes["moe"] = model.moe.model_copy(update={"intermediate_size": width, **layers})
    return model.model_copy(update=changes)


def make_runner(
    model: ModelConfig, layout: Layout, *, cache_dtype: torch.dtype = torch.bfloat16, split: bool = False
) -> MetaRunner:
    """A rank with weights as `kernels.gpu` packs them, all without values; inside `no_device`."""
    dtype = torch.bfloat16
    weights = MetaWeights(model, layout.formats, device=META, dtype=dtype, one_codebook=layout.one_codebook)
    weights.split = split
    group = TensorParallelGroup(0, 1)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        # Which words a codebook has can't be asked of it.
        patch.setattr(pack.words, "possible", lambda scale, zero: True)
        patch.setattr(pack, "_lines", functools.partial(_lines, one_codebook=layout.one_codebook))
        patch.setattr(vocabulary, "_AT_ONCE", 1 << 40)  # there is no memory to spare
        decoder = build_model(model, weights, group, dtype=dtype, device=META, quantize_embeddings=layout.embeddings)
    heads = model.num_key_value_heads
    cache = kv_cache.allocate(model, heads, num_blocks=BLOCKS, block_size=BLOCK_SIZE, dtype=cache_dtype, device=META)
    return MetaRunner(decoder, cache, dtype=dtype, device=META)


@contextmanager
def no_device() -> Iterator[None]:
    """The GPU's kernels for tensors without values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_kernels", lambda device: gpu)
        patch.setattr(padding, "_on_host", lambda tensor: tensor)
        yield


def _lines(scale: Tensor, zero: Tensor, *, one_codebook: bool) -> tuple[int, Tensor, Tensor, Tensor | None]:
    """In place of `pack._lines`: one line for all columns, or one a column, with exact words among them."""
    experts, n = scale.shape
    shape = (1,) if one_codebook else (experts, n)
    multiplier, addend = (torch.empty(shape, dtype=torch.int32, device=META) for _ in range(2))
    if one_codebook:
        return assembly.CCQ_PAIR.value, multiplier, addend, None
    exact = torch.empty((experts, -(-n // BLOCK)), dtype=torch.uint8, device=META)
    return assembly.CCQ_MIXED.value, multiplier, addend, exact
