"""Rotation, and the write into the cache, as Triton kernels."""

from __future__ import annotations

import pytest
import torch
from attention_cases import empty_cache
from torch.testing import assert_close

from kernels import gpu, reference

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.float16]
"""The interpreter cuts bf16 off where a GPU rounds."""
CACHES = [torch.float32, torch.int8]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(head_dim):
    positions = torch.tensor([0, 1, 77, 5000, 131071], dtype=torch.int32)
    inv_freq = 1.0 / 5e5 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return gpu.rotary_table(positions, inv_freq), reference.rotary_table(positions, inv_freq)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (9, 6), (1, 2), (2, 80)])
def test_rotary(heads, head_dim, interleaved, dtype):
    table, expected_table = tables(head_dim)
    assert_close(table.transpose(1, 2), expected_table, rtol=1e-6, atol=1e-6)
    x = random(5, heads + 2, head_dim, dtype=dtype)[:, :heads]
    actual = gpu.rotary(x, table, interleaved=interleaved)
    eps = 2 * torch.finfo(dtype).eps
    assert_close(actual, reference.rotary(x, expected_table, interleaved=interleaved), rtol=eps, atol=4 * eps)
    assert torch.equal(actual[0], x[0]), "position 0 turns nothing"


def same(actual, expected):
    """The same bytes, in slots that were not written too."""
    assert torch.equal(actual.keys, expected.keys)
    assert torch.equal(actual.values, expected.values)
    if expected.quantized:
        assert torch.equal(actual.key_scales, expected.key_scales)
        assert torch.equal(actual.value_scales, expected.value_scales)


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 64), (9, 3, 16), (20, 10, 6)])
def test_rotary_and_store_are_rotary_then_store(heads, kv_heads, head_dim, interleaved, cache_dtype):
    qkv = random(5, heads + 2 * kv_heads, head_dim)
    table, expected_table = tables(head_dim)
    ours, theirs = (empty_cache(4, 4, kv_heads, head_dim, cache_dtype) for _ in range(2))
    slots = torch.tensor([3, 4, 15, 8, 0])
    options = {"num_heads": heads, "interleaved": interleaved}
    # A table of the reference's values, so that keys agree to the bit.
    table = expected_table.transpose(1, 2).contiguous()
    q = gpu.rotary_store_kv(qkv, table, ours, slots, **options)
    expected = reference.rotary_store_kv(qkv, expected_table, theirs, slots, **options)
    assert_close(q, expected, rtol=1e-6, atol=1e-6)
    same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantized", [False, True])
def test_store_kv(dtype, quantized):
    kv = random(6, 7, 24, dtype=dtype)  # keys and values stand in a wider tensor
    kv[1] *= 1e-6  # subnormal scales
    kv[2, 4] = 0.0
    kv[3] *= 1000
    ours, theirs = (empty_cache(3, 4, 3, 24, torch.int8 if quantized else dtype) for _ in range(2))
    slots = torch.tensor([0, 11, 5, 2, 7, 6])
    gpu.store_kv(kv[:, :3], kv[:, 4:], ours, slots)
    reference.store_kv(kv[:, :3], kv[:, 4:], theirs, slots)
    same(ours, theirs)
