"""Addresses beyond 2^31 elements: caches, stacks and batches of full size, of which almost all pages are never touched.

A product in 32 bits would wrap around to an address that nothing is at, and end the process.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import weights as make
from torch import Tensor
from torch.testing import assert_close

from kernels import gpu, reference
from kernels.cache import SCALE_DTYPE, LayerCache
from kernels.gpu import launch
from kernels.gpu.arrange import activate_kernel, combine_kernel, finish_kernel
from kernels.gpu.linear import prepare
from kernels.gpu.packed import GpuPrepared, Packed
from kernels.gpu.shapes import FEW, SHAPES, Shape

torch.set_num_threads(1)

FAR = 1 << 31
"""The first index that an int32 doesn't hold."""


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take address space, and memory only where something is written."""
    # numpy takes zeroed pages from the system, which only then are there.
    return torch.from_numpy(np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def rows_apart(x: Tensor) -> Tensor:
    """The same rows, 2^30 elements after one another: the third is beyond int32, and the stride is not."""
    room = sparse((len(x) - 1) * (1 << 30) + x[0].numel(), dtype=x.dtype)
    far = room.as_strided(x.shape, (1 << 30, *x.stride()[1:]))
    return far.copy_(x)


def moved(weight: Packed, expert: int) -> Packed:
    """A stack in which the only matrix of `weight` is number `expert`."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}

    def stack(tensor: Tensor) -> Tensor:
        whole = sparse(expert + 2, *tensor.shape[1:], dtype=tensor.dtype)
        whole[expert] = tensor[0]
        return whole

    stacked = {"codes", "column_scale", "group_scales", "zeros", "exact"} | (
        {"multiplier", "addend"} if weight.multiplier is not None and weight.multiplier.dim() == 2 else set()
    )
    return replace(weight, **{n: stack(t) for n, t in values.items() if n in stacked and isinstance(t, Tensor)})


FORMATS = {
    "ccq": lambda: make.ccq(1, n=64, k=256),
    "ccq, a codebook a column": lambda: make.ccq(1, n=64, k=256, pair=None),
    "int8": lambda: make.int8(1, n=64, k=128),
    "int4": lambda: make.int4(1, n=64, k=128),
    "planes": lambda: make.planes(1, n=64, k=512, count=2, group=64),
    "grouped": lambda: make.grouped(1, n=64, k=128, group=64),
}


@pytest.mark.parametrize(
    ("name", "shape"),
    # Fewer rows than eight are for weights whose scales change along K.
    [(name, shape) for name in FORMATS for shape in (FEW[1], SHAPES[0]) if shape is SHAPES[0] or name[:3] != "int"],
    ids=str,
)
def test_experts_far_into_a_stack(name: str, shape: Shape) -> None:
    torch.manual_seed(0)
    weight = FORMATS[name]()
    (packed,) = prepare(weight, dtype=torch.float32, device=make.CPU).parts
    expert = FAR // packed.codes[0].numel() + 1
    x = torch.randn(3, packed.in_features)
    slots = torch.full((1, shape.rows), 3, dtype=torch.int32)
    slots[0, :3] = torch.tensor([2, 0, 1])
    out = launch.multiply(
        x,
        GpuPrepared((moved(packed, expert),)),
        rows=3,
        shape=shape,
        blocks=(slots, torch.tensor([expert], dtype=torch.int32)),
    )
    assert_close(out.float().sum(0), x @ make.dense(weight)[0].t(), rtol=1e-4, atol=1e-4)


def test_rows_far_into_a_batch() -> None:
    torch.manual_seed(0)
    x = rows_apart(torch.randn(3, 128).half())
    near = x.clone()
    prepared = prepare(make.int8(n=64, k=128), dtype=torch.float16, device=make.CPU)
    assert torch.equal(gpu.linear(x, prepared), gpu.linear(near, prepared))
    norm = torch.rand(128).half()
    assert torch.equal(gpu.rms_norm(x, norm, 1e-5), gpu.rms_norm(near, norm, 1e-5))
    assert torch.equal(gpu.add_rms_norm(x, x, norm, 1e-5)[0], gpu.add_rms_norm(near, near, norm, 1e-5)[0])
    assert torch.equal(gpu.silu_and_mul(x), gpu.silu_and_mul(near))
    table = gpu.rotary_table(torch.arange(3, dtype=torch.int32), torch.rand(8))
    turned = (gpu.rotary(rows.view(3, 8, 16), table, interleaved=True) for rows in (x, near))
    assert torch.equal(*turned)


def test_a_row_far_into_a_table() -> None:
    width, row = 64, FAR // 64 + 5
    table = sparse(row + 1, width, dtype=torch.float16)
    table[row] = torch.randn(width).half()
    assert torch.equal(gpu.embedding(torch.tensor([row, 3]), table, 0), table[[row, 3]])


def test_sums_of_parts_far_behind_the_first() -> None:
    width, splits, rows = 64, 3, FAR // 128 + 1
    sums = sparse(splits, rows, width, dtype=torch.float16)  # the last part begins beyond
    sums[:, 0] = torch.randn(splits, width).half()
    out = torch.zeros(1, width)
    finish_kernel[(1, 1)](sums, sums, out, rows, width, splits, BIAS=False, BLOCK=64, enable_fp_fusion=True)
    assert_close(out, sums[:, 0].float().sum(0, keepdim=True))
    gated = torch.zeros(1, width // 2)
    activate_kernel[(1, 1)](sums, gated, rows, width // 2, splits, BLOCK=64, enable_fp_fusion=True)
    assert_close(gated, reference.silu_and_mul(out))
    combined = torch.zeros(1, width)
    combine_kernel[(1, 1)](sums, torch.ones(1), combined, rows, width, splits, TOP_K=1, BLOCK=64, enable_fp_fusion=True)
    assert_close(combined, out)


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8])
def test_blocks_far_into_a_cache(cache_dtype: torch.dtype) -> None:
    """Written by the model's kernel, and by the one that writes alone; read in decoding and in prefill."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim, block_size, tokens = 4, 2, 64, 16, 40
    first = FAR // (block_size * kv_heads * head_dim) + 3
    caches = []
    for num_blocks in (first + 3, 3):
        pages = [sparse(num_blocks, block_size, kv_heads, head_dim, dtype=cache_dtype) for _ in range(2)]
        scales = [sparse(num_blocks, kv_heads, block_size, dtype=SCALE_DTYPE) for _ in range(2)]
        caches.append(LayerCache(*pages, *(scales if cache_dtype == torch.int8 else ())))
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).half()
    positions = torch.arange(tokens, dtype=torch.int32)
    table = gpu.rotary_table(positions, 1.0 / 5e5 ** (torch.arange(0, head_dim, 2) / head_dim))
    found = []
    for cache, start in zip(caches, (first, 0), strict=True):
        slots = torch.arange(tokens) + start * block_size
        q = gpu.rotary_store_kv(qkv, table, cache, slots, num_heads=heads, interleaved=True)
        turned = gpu.rotary(qkv, table, interleaved=True)
        gpu.store_kv(turned[-1:, heads : heads + kv_heads], qkv[-1:, heads + kv_heads :], cache, slots[-1:])
        for new in (tokens, 1):  # prefill, and the last token by decoding
            metadata = gpu.attention_metadata(
                np.arange(start, start + 3, dtype=np.int32)[None],
                np.array([0, new], dtype=np.int32),
                np.array([tokens], dtype=np.int32),
                block_size=block_size,
                dtype=torch.float16,
                device=make.CPU,
            )
            found.append(gpu.paged_attention(q[-new:], cache, metadata, scale=0.1))
    assert found[0].abs().max() > 0.1
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
