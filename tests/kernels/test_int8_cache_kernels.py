"""Quantizing keys and values, and attention over them, on the CPU and in the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu, reference
from kernels.cache import SCALE_DTYPE, LayerCache, token_bytes
from kernels.reference.cache import quantize

torch.set_num_threads(1)
CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**32)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8_cache(num_blocks, block_size, kv_heads, head_dim):
    pages = torch.zeros((2, num_blocks, block_size, kv_heads, head_dim), dtype=torch.int8)
    return LayerCache(*pages, *torch.zeros((2, num_blocks, kv_heads, block_size), dtype=SCALE_DTYPE))


@quick
@given(seeds, st.integers(1, 40), st.floats(-4, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_values_come_back_within_half_a_step(seed, head_dim, exponent, dtype):
    x = random(3, 2, head_dim, seed=seed, dtype=dtype) * 10**exponent
    rounded, scale = quantize(x)
    assert rounded.dtype == torch.int8
    back = rounded.float() * scale.float().unsqueeze(-1)
    # A scale below the normal numbers of fp16 has an absolute error of 2^-25, 127 times which is cut off.
    bound = scale.float().unsqueeze(-1) * (0.5 + 1e-5) + 127 * 2.0**-25
    assert ((back - x.float()).abs() <= bound).all()
    assert (rounded.int().abs().amax(-1) <= 127).all()


def test_ties_go_to_the_even_integer():
    rounded, scale = quantize(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]))
    assert float(scale) == 1.0
    assert rounded.tolist() == [127, 0, 2, 2, 0, -2]


def test_zeros_stay_zeros():
    rounded, scale = quantize(torch.zeros(2, 4))
    assert not rounded.any()
    assert not scale.any()


@quick
@given(seeds, st.integers(1, 20), st.sampled_from([1, 3, 16]))
def test_store_kv_writes_its_slots_and_no_other(seed, tokens, block_size):
    slots = torch.randperm(8 * block_size, generator=torch.Generator().manual_seed(seed))[:tokens]
    kv = random(len(slots), 6, 4, seed=seed)
    ours, theirs = (int8_cache(8, block_size, 2, 4) for _ in range(2))
    cpu.store_kv(kv[:, 2:4], kv[:, 4:], ours, slots)
    reference.store_kv(kv[:, 2:4], kv[:, 4:], theirs, slots)
    written = torch.zeros(8 * block_size, dtype=torch.bool).index_fill_(0, slots, True).view(8, block_size)
    for name in ("keys", "values", "key_scales", "value_scales"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert not ours.keys[~written].any()
    assert not ours.value_scales.transpose(1, 2)[~written].any()
    rounded, scale = quantize(kv[:, 4:])
    assert torch.equal(ours.values.flatten(0, 1)[slots], rounded)
    assert torch.equal(ours.value_scales.transpose(1, 2).flatten(0, 1)[slots], scale)


@pytest.mark.parametrize("requests", [[(1, 40)], [(1, 9), (1, 40), (5, 30), (17, 17)]], ids=str)
@pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])
def test_attention_is_exact_over_the_rounded_values(kernels, requests):
    block_size, kv_heads, group, head_dim = 4, 2, 3, 8
    quantized = int8_cache(40, block_size, kv_heads, head_dim)
    exact = LayerCache(*torch.zeros(2, 40, block_size, kv_heads, head_dim))
    block_tables = np.zeros((len(requests), 10), dtype=np.int32)
    for r, (_, context) in enumerate(requests):
        block_tables[r] = np.arange(10) * len(requests) + r
        slots = torch.tensor(
            [int(block_tables[r, p // block_size]) * block_size + p % block_size for p in range(context)]
        )
        k, v = (random(context, kv_heads, head_dim, seed=seed) for seed in (2 * r, 2 * r + 1))
        kernels.store_kv(k, v, quantized, slots)
        rounded = (q.float() * scale.float().unsqueeze(-1) for q, scale in map(quantize, (k, v)))
        kernels.store_kv(*rounded, exact, slots)
    query_start = np.cumsum([0, *(count for count, _ in requests)], dtype=np.int32)
    contexts = np.array([context for _, context in requests], dtype=np.int32)
    metadata = kernels.attention_metadata(
        block_tables, query_start, contexts, block_size=block_size, dtype=torch.float32, device=CPU
    )
    q = random(int(query_start[-1]), kv_heads * group, head_dim, seed=9)
    actual, expected = (kernels.paged_attention(q, cache, metadata, scale=0.4) for cache in (quantized, exact))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_rotary_and_store_in_one(quantized, interleaved):
    qkv, slots = random(5, 7, 8), torch.tensor([0, 9, 3, 4, 11])
    caches = [int8_cache(3, 4, 2, 8) if quantized else LayerCache(*torch.zeros(2, 3, 4, 2, 8)) for _ in range(2)]
    queries = []
    for kernels, cache in zip((cpu, reference), caches, strict=True):
        table = kernels.rotary_table(torch.arange(5) * 100, torch.tensor([1.0, 0.3, 0.1, 0.01]))
        options = {"num_heads": 3, "interleaved": interleaved}
        queries.append(kernels.rotary_store_kv(qkv, table, cache, slots, **options))
        turned = kernels.rotary(qkv[:, :5], table, interleaved=interleaved)
        assert torch.equal(queries[-1], turned[:, :3])
        if not quantized:
            assert torch.equal(cache.keys.flatten(0, 1)[slots], turned[:, 3:])
            assert torch.equal(cache.values.flatten(0, 1)[slots], qkv[:, 5:])
    torch.testing.assert_close(*queries)
    assert (caches[0].keys.float() - caches[1].keys.float()).abs().max() <= (1 if quantized else 1e-5)


def test_bytes_of_a_token():
    assert token_bytes(8, 128, torch.bfloat16) == 4096
    assert token_bytes(8, 128, torch.int8) == 2048 + 32
