"""Norms, the activation and the embedding as Triton kernels."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from kernels import reference
from kernels.gpu.activation import silu_and_mul
from kernels.gpu.embedding import embedding
from kernels.gpu.norm import add_rms_norm, rms_norm

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.float16]
"""The interpreter cuts bf16 off where a GPU rounds."""
SHAPES = [(1, 64), (3, 96), (2, 1030), (5, 1)]


def close(actual, expected):
    """To an ulp or two of the dtype."""
    assert actual.dtype == expected.dtype
    eps = torch.finfo(expected.dtype).eps
    assert_close(actual, expected, rtol=2 * eps, atol=2 * eps)


def random(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_norms(tokens, width, dtype):
    x, residual = (random(tokens, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = random(width, dtype=dtype, seed=2)
    before = x.clone(), residual.clone()
    close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    close(normed, expected)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_the_norm_is_rounded_before_the_weight():
    """As transformers does it; rounded once, many of the products would be others."""
    x, weight = random(4, 512, dtype=torch.float16), random(512, dtype=torch.float16, seed=1)
    normed = rms_norm(x, torch.ones_like(weight), 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5), normed * weight)


def test_norm_of_rows_that_are_part_of_wider_ones():
    x = random(3, 100, dtype=torch.float32)[:, :64]
    weight = random(64, dtype=torch.float32)
    close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    close(add_rms_norm(x, x, weight, 1e-5)[0], reference.add_rms_norm(x, x, weight, 1e-5)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_silu_and_mul(tokens, width, dtype):
    x = random(tokens, 2 * width, dtype=dtype)
    close(silu_and_mul(x), reference.silu_and_mul(x))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_sums_to_the_whole_table(dtype, ranks):
    table = random(12, 1100, dtype=dtype)
    ids = torch.tensor([0, 11, 4, 4, 7, 3, 8], dtype=torch.int32)
    rows = 12 // ranks
    parts = [embedding(ids, table[r * rows : (r + 1) * rows], r * rows) for r in range(ranks)]
    assert torch.equal(torch.stack(parts).sum(0), table[ids.long()])
