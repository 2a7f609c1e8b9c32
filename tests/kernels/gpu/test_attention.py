"""Paged attention as Triton kernels gives what the reference gives."""

from __future__ import annotations

import logging

import pytest
import torch
from attention_cases import Batch

from kernels import gpu, reference
from kernels.gpu import attention

torch.set_num_threads(1)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
DECODES = [(1, 1), (1, 16), (1, 33), (1, 70)]
MIXED = [(1, 40), (7, 7), (1, 1), (20, 51), (3, 35), (2, 2)]


def check(batch: Batch) -> None:
    metadata = batch.metadata(gpu)
    actual = gpu.paged_attention(batch.q, batch.cache, metadata, scale=0.2)
    expected = batch.expected(scale=0.2)
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[batch.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("requests", [[(1, 1)], DECODES, [(5, 5)], [(70, 90)], MIXED], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (2, 8)], ids=str)
def test_batches(requests, heads):
    check(Batch(requests, heads))


@pytest.mark.parametrize("heads", [(2, 3), (1, 5), (1, 7), (1, 16), (1, 20)], ids=str)
def test_groups_of_any_number_of_heads(heads):
    check(Batch([(1, 20), (9, 30), (2, 17)], heads))


@pytest.mark.parametrize(("block_size", "head_dim"), [(4, 64), (1, 64), (16, 128), (48, 64)])
def test_blocks_and_heads_of_any_size(block_size, head_dim):
    check(Batch([(1, 50), (18, 40), (1, 3)], (2, 4), block_size=block_size, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [8, 80, 96, 112, 192, 256])
def test_heads_of_any_size_up_to_256(head_dim, monkeypatch):
    monkeypatch.setattr(attention, "MIN_SPLIT_KEYS", 16)
    dtype = torch.float32 if head_dim < 100 else torch.float16
    cache_dtype = torch.int8 if head_dim in (96, 192) else dtype
    requests = [(1, 50), (18, 40), (1, 3)]
    check(Batch(requests, (1, 2), head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8])
def test_fp16(cache_dtype):
    check(Batch(MIXED, (2, 4), dtype=torch.float16, cache_dtype=cache_dtype))


@pytest.mark.parametrize("requests", [DECODES, MIXED], ids=str)
def test_int8_cache(requests):
    check(Batch(requests, (2, 4), cache_dtype=torch.int8))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_contexts_divided_among_programs(monkeypatch, cache_dtype):
    """Parts of the keys, some contexts shorter than there are parts, and requests of two and three queries."""
    monkeypatch.setattr(attention, "MIN_SPLIT_KEYS", 16)
    batch = Batch([(1, 200), (1, 1), (2, 65), (3, 97), (1, 40)], (2, 4), cache_dtype=cache_dtype)
    assert attention.num_splits(5 * 2, 200, attention.H100.multiprocessors) > 7
    check(batch)


def test_a_divided_context_gives_the_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(attention, "MIN_SPLIT_KEYS", 16)
    batch = Batch([(1, 200), (1, 90)], (2, 4))
    one, other = (gpu.paged_attention(batch.q, batch.cache, batch.metadata(gpu), scale=0.2) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("context", [40, 300])
def test_a_captured_decode_step_serves_other_contexts(context):
    """Metadata made of tensors launches the same whatever they hold, and a request without a context gives zeros."""
    batch = Batch([(1, context), (1, 5), (1, 130)], (1, 4))
    tables, starts, lengths = map(torch.from_numpy, (batch.block_tables, batch.query_start, batch.context_lens))
    metadata = gpu.decode_metadata(tables, starts, lengths, block_size=16, dtype=torch.float32)
    for change in (0, 3):
        lengths -= change
        expected = reference.paged_attention(batch.q, batch.cache, metadata, scale=0.2)
        actual = gpu.paged_attention(batch.q, batch.cache, metadata, scale=0.2)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    lengths[1] = 0
    assert not gpu.paged_attention(batch.q, batch.cache, metadata, scale=0.2)[1].any()


def test_int8_is_within_its_bound_of_exact_attention():
    """With e the largest change of a score, weights change by factors within exp(+-2e); values by half a scale."""
    batch = Batch(MIXED, (2, 4), cache_dtype=torch.int8)
    scale = 64**-0.5
    actual = gpu.paged_attention(batch.q, batch.cache, batch.metadata(gpu), scale=scale)
    exact = batch.expected(batch.exact, scale=scale)
    used = batch.cache.key_scales.float() < 100  # scales of slots never written are 100
    key_step, value_step = (s.float()[used].max() for s in (batch.cache.key_scales, batch.cache.value_scales))
    score_change = scale * batch.q.abs().sum(-1, keepdim=True) * key_step / 2  # [T, heads, 1]
    largest = batch.exact.values[batch.exact.values < 1e3].abs().max()
    bound = (torch.exp(2 * score_change) - 1) * largest + value_step / 2 + 1e-5
    difference = (actual - exact).abs()
    assert (difference <= bound).all()
    assert difference.max() > 1e-3, "it was quantized"
    assert bound.max() < 1.5, "values go up to about 4"


def test_how_contexts_are_divided():
    assert attention.num_splits(8, 131072, 132) == 33  # 264 programs of one request's 8 kv heads
    assert attention.num_splits(8, 1024, 132) == 4
    assert attention.num_splits(8, 100, 132) == 1
    assert attention.num_splits(512, 131072, 132) == 1
    assert attention.num_splits(1, 131072, 132) == attention.MAX_SPLITS


def test_other_heads_go_to_the_reference_with_one_warning(caplog):
    batch = Batch([(1, 20), (3, 9)], (2, 2), head_dim=264)
    with caplog.at_level(logging.WARNING):
        check(batch)
        check(batch)
    assert [record.getMessage().split(" have")[0] for record in caplog.records] == ["attention heads of 264 features"]


def test_metadata_of_another_device_is_refused():
    batch = Batch([(1, 4)], (1, 1))
    with pytest.raises(TypeError, match="made for another device"):
        gpu.paged_attention(batch.q, batch.cache, batch.metadata(reference), scale=1.0)
