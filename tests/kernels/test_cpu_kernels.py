"""The CPU's kernels compute what the reference means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu, ops, reference
from kernels.cache import LayerCache
from kernels.operands import DenseWeight
from kernels.prepared import DensePrepared

torch.set_num_threads(1)
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
seeds = st.integers(0, 2**32)
quick = settings(deadline=None, max_examples=30)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(actual, expected, dtype=torch.float32):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


# Routing and experts


def experts(generator, num_experts, hidden, width, dtype):
    gate_up = torch.randn(num_experts, 2 * width, hidden, generator=generator) / hidden**0.5
    down = torch.randn(num_experts, hidden, width, generator=generator) / width**0.5
    return DensePrepared.of(gate_up.to(dtype)), DensePrepared.of(down.to(dtype))


@quick
@given(seeds, st.sampled_from([1, 2, 3, 17, 64]), st.integers(1, 9), st.data())
def test_fused_moe(seed, tokens, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    hidden, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = rng(seed)
    gate_up, down = experts(generator, num_experts, hidden, width, dtype)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator)
    actual = cpu.fused_moe(x, gate_up, down, weights, ids)
    expected = reference.fused_moe(x, gate_up, down, weights, ids)
    if dtype == torch.float32:
        check(actual, expected)
    else:  # one number, of thousands, may differ by several roundings
        assert (actual - expected).float().norm() <= 2e-2 * expected.float().norm() + 1e-3


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("expert", [0, 3, 7])
def test_fused_moe_with_all_tokens_at_one_expert(tokens, expert):
    gate_up, down = experts(rng(0), 8, 24, 20, torch.float32)
    x = torch.randn(tokens, 24, generator=rng(1))
    ids = torch.full((tokens, 1), expert)
    weights = torch.rand(tokens, 1, generator=rng(2))
    check(cpu.fused_moe(x, gate_up, down, weights, ids), reference.fused_moe(x, gate_up, down, weights, ids))


def test_a_token_is_computed_alike_alone_and_in_a_batch():
    gate_up, down = experts(rng(0), 8, 24, 20, torch.float32)
    x = torch.randn(50, 24, generator=rng(1))
    weights, ids = ops.route(x, torch.randn(8, 24, generator=rng(2)), None, top_k=3, norm_min=1e-12)
    together = ops.fused_moe(x, gate_up, down, weights, ids)
    for t in (0, 7, 49):
        alone = ops.fused_moe(x[t : t + 1], gate_up, down, weights[t : t + 1], ids[t : t + 1])
        check(together[t : t + 1], alone)


@quick
@given(seeds, st.integers(1, 20), st.integers(1, 70), st.booleans(), st.data())
def test_route(seed, tokens, num_experts, with_bias, data):
    top_k = data.draw(st.integers(1, num_experts))
    norm_min = data.draw(st.sampled_from([1e-12, 0.5]))
    generator = rng(seed)
    x = torch.randn(tokens, 12, generator=generator)
    gate = torch.randn(num_experts, 12, generator=generator)
    bias = torch.randn(num_experts, generator=generator) if with_bias else None
    weights, ids = cpu.route(x, gate, bias, top_k=top_k, norm_min=norm_min)
    expected_weights, expected_ids = reference.route(x, gate, bias, top_k=top_k, norm_min=norm_min)
    scores = torch.softmax(x @ gate.T, dim=-1) + (0 if bias is None else bias)
    check(scores.gather(1, ids), scores.gather(1, expected_ids))  # what rounding makes equal may change places
    check(weights, expected_weights)


@pytest.mark.parametrize("kernels", [cpu, reference])
class TestRouting:
    def test_chooses_by_bias_but_weighs_without_it(self, kernels):
        x, gate = torch.ones(1, 1), torch.tensor([[3.0], [2.0], [1.0]])
        p = torch.softmax(gate[:, 0], dim=0)
        weights, ids = kernels.route(x, gate, torch.tensor([-1.0, 0.0, 0.1]), top_k=2, norm_min=1e-12)
        assert ids.tolist() == [[2, 1]] or ids.tolist() == [[1, 2]]
        torch.testing.assert_close(weights[0], p[ids[0]] / p[ids[0]].sum())

    def test_ties_go_to_the_lower_expert(self, kernels):
        _, ids = kernels.route(torch.ones(3, 4), torch.zeros(64, 4), torch.zeros(64), top_k=6, norm_min=1e-12)
        assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 3

    def test_the_divisor_has_a_least_value(self, kernels):
        weights, _ = kernels.route(torch.ones(1, 1), torch.zeros(4, 1), None, top_k=1, norm_min=0.5)
        assert weights.tolist() == [[0.5]]

    def test_is_fp32_whatever_the_input(self, kernels):
        x, gate = torch.randn(5, 8, generator=rng(0)).bfloat16(), torch.randn(6, 8, generator=rng(1))
        weights, ids = kernels.route(x, gate, None, top_k=2, norm_min=1e-12)
        same_weights, same_ids = kernels.route(x.float(), gate, None, top_k=2, norm_min=1e-12)
        assert weights.dtype == torch.float32
        assert ids.dtype == torch.int64
        assert torch.equal(ids, same_ids)
        assert torch.equal(weights, same_weights)


# Norms, activation, rotation, embedding


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 80), st.sampled_from(DTYPES))
def test_rms_norm(seed, tokens, hidden, dtype):
    generator = rng(seed)
    x, residual = (torch.randn(tokens, hidden, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(hidden, generator=generator).to(dtype)
    before = x.clone(), residual.clone()
    check(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    for actual, expected in zip(
        cpu.add_rms_norm(x, residual, weight, 1e-5), reference.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        check(actual, expected, dtype)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 50), st.sampled_from(DTYPES))
def test_silu_and_mul(seed, tokens, width, dtype):
    x = torch.randn(tokens, 2 * width, generator=rng(seed)).to(dtype)
    before = x.clone()
    check(cpu.silu_and_mul(x), reference.silu_and_mul(x), dtype)
    assert torch.equal(x, before)


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 6), st.integers(1, 20), st.booleans(), st.sampled_from(DTYPES))
def test_rotary_turns_part_of_the_heads(seed, tokens, heads, half, interleaved, dtype):
    generator = rng(seed)
    qkv = torch.randn(tokens, heads + 2, 2 * half, generator=generator).to(dtype)
    positions = torch.randint(0, 2**17, (tokens,), generator=generator, dtype=torch.int32)
    inv_freq = 1.0 / 5e5 ** (torch.arange(half, dtype=torch.float32) / half)
    before = qkv.clone()
    x = qkv[:, :heads]
    actual, expected = (
        kernels.rotary(x, kernels.rotary_table(positions, inv_freq), interleaved=interleaved)
        for kernels in (cpu, reference)
    )
    assert actual.shape == x.shape
    check(actual, expected, dtype)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("interleaved", "pairs"), [(True, [(0, 1), (2, 3), (4, 5)]), (False, [(0, 3), (1, 4), (2, 5)])]
)
@pytest.mark.parametrize("kernels", [cpu, reference])
def test_rotary_turns_each_pair_by_its_angle(kernels, interleaved, pairs, dtype):
    x = torch.randn(4, 2, 6, generator=rng(3)).to(dtype)
    positions, inv_freq = torch.tensor([0, 1, 5, 1000]), torch.tensor([1.0, 0.1, 0.003])
    actual = kernels.rotary(x, kernels.rotary_table(positions, inv_freq), interleaved=interleaved)
    expected = torch.empty_like(x)
    for t, position in enumerate(positions.tolist()):
        for (a, b), frequency in zip(pairs, inv_freq.tolist(), strict=True):
            angle = position * frequency
            first, second = x[t, :, a].float(), x[t, :, b].float()
            expected[t, :, a] = first * math.cos(angle) - second * math.sin(angle)
            expected[t, :, b] = second * math.cos(angle) + first * math.sin(angle)
    check(actual, expected, dtype)
    assert torch.equal(actual[0], x[0])  # position 0 turns nothing


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.sampled_from(DTYPES))
def test_linear_adds_its_bias(seed, tokens, k, n, dtype):
    generator = rng(seed)
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    w = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    weight = ops.prepare(DenseWeight(w), dtype=dtype, device=CPU)
    expected = x.double() @ w.double().T
    for kernels in (cpu, reference):
        check(kernels.linear(x, weight), expected.to(dtype), dtype)
        check(kernels.linear(x, weight, bias), (expected + bias.double()).to(dtype), dtype)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kernels", [cpu, reference])
def test_embedding_sums_to_the_whole_table(kernels, ranks):
    table = torch.randn(12, 5, generator=rng(0))
    ids = torch.tensor([0, 11, 4, 4, 7, 3, 8], dtype=torch.int32)
    rows = 12 // ranks
    parts = [kernels.embedding(ids, table[r * rows : (r + 1) * rows], r * rows) for r in range(ranks)]
    assert torch.equal(torch.stack(parts).sum(0), table[ids.long()])


# Attention


def cache_with_contexts(generator, contexts, kv_heads, head_dim, block_size, dtype):
    """A cache whose unused slots hold large numbers, so that looking at one shows."""
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + 3
    cache = LayerCache(*torch.full((2, num_blocks, block_size, kv_heads, head_dim), 1e4, dtype=dtype))
    order = torch.randperm(num_blocks, generator=generator).tolist()
    block_tables = np.zeros((len(contexts), max(counts)), dtype=np.int32)
    for r, context in enumerate(contexts):
        blocks = [order.pop() for _ in range(counts[r])]
        block_tables[r, : counts[r]] = blocks
        slots = torch.tensor([blocks[p // block_size] * block_size + p % block_size for p in range(context)])
        k, v = (torch.randn(context, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        reference.store_kv(k, v, cache, slots)
    return cache, block_tables


@st.composite
def batches(draw):
    """(new tokens, context) of each request."""
    requests = []
    for _ in range(draw(st.integers(1, 7))):
        count = draw(st.sampled_from([1, 1, 1, 2, 5, 30]))
        past = draw(st.sampled_from([0, 0, 1, 3, 16, 70, 150]))
        requests.append((count, count + past))
    return requests


@settings(deadline=None, max_examples=60)
@given(
    seeds, batches(), st.sampled_from([1, 4, 16]), st.sampled_from([(1, 1), (2, 3), (4, 1)]), st.sampled_from([8, 5])
)
def test_paged_attention(seed, requests, block_size, heads, head_dim):
    kv_heads, group = heads
    generator = rng(seed)
    counts, contexts = zip(*requests, strict=True)
    cache, block_tables = cache_with_contexts(generator, contexts, kv_heads, head_dim, block_size, torch.float32)
    # As in the model, queries are part of a wider tensor.
    q = torch.randn(sum(counts), kv_heads * group + 2, head_dim, generator=generator)[:, : kv_heads * group]
    arrays = block_tables, np.cumsum([0, *counts], dtype=np.int32), np.array(contexts, dtype=np.int32)
    options = {"block_size": block_size, "dtype": torch.float32, "device": CPU}
    actual = cpu.paged_attention(q, cache, cpu.attention_metadata(*arrays, **options), scale=0.4)
    expected = reference.paged_attention(q, cache, reference.attention_metadata(*arrays, **options), scale=0.4)
    check(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "context"), [(600, 600), (600, 700), (257, 1000), (256, 300), (2, 1024)])
def test_chunks_longer_than_a_tile(count, context, dtype):
    generator = rng(count)
    cache, block_tables = cache_with_contexts(generator, [context, 9], 2, 8, 16, dtype)
    q = torch.randn(count + 1, 4, 8, generator=generator).to(dtype)
    arrays = block_tables, np.array([0, count, count + 1], dtype=np.int32), np.array([context, 9], dtype=np.int32)
    options = {"block_size": 16, "dtype": dtype, "device": CPU}
    actual = cpu.paged_attention(q, cache, cpu.attention_metadata(*arrays, **options), scale=0.4)
    expected = reference.paged_attention(q, cache, reference.attention_metadata(*arrays, **options), scale=0.4)
    check(actual, expected, dtype)


@quick
@given(seeds, st.integers(1, 20), st.integers(1, 5), st.sampled_from(DTYPES))
def test_store_kv_writes_its_slots_and_no_other(seed, tokens, block_size, dtype):
    generator = rng(seed)
    caches = [LayerCache(*torch.zeros(2, 8, block_size, 2, 4, dtype=dtype)) for _ in range(2)]
    slots = torch.randperm(8 * block_size, generator=generator)[: min(tokens, 8 * block_size)]
    kv = torch.randn(len(slots), 6, 4, generator=generator).to(dtype)
    for kernels, cache in zip((cpu, reference), caches, strict=True):
        kernels.store_kv(kv[:, 2:4], kv[:, 4:], cache, slots)
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)
    assert torch.equal(caches[0].keys.flatten(0, 1)[slots], kv[:, 2:4])


def test_metadata_of_another_device_is_refused():
    arrays = np.zeros((1, 1), np.int32), np.array([0, 1], np.int32), np.array([1], np.int32)
    metadata = reference.attention_metadata(*arrays, block_size=4, dtype=torch.float32, device=CPU)
    q, cache = torch.zeros(1, 1, 4), torch.zeros(1, 4, 1, 4)
    with pytest.raises(TypeError, match="made for another device"):
        ops.paged_attention(q, LayerCache(cache, cache), metadata, scale=1.0)
