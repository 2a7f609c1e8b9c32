"""The experts of a layer against every expert on all tokens."""

from __future__ import annotations

import pytest
import torch
import weights as make

from kernels import reference
from kernels.gpu.experts import fused_moe
from kernels.gpu.linear import prepare
from kernels.operands import DenseWeight, Weight
from kernels.prepared import DensePrepared

torch.set_num_threads(1)

EXPERTS = 5
FORMATS = {
    "ccq": lambda n, k: make.ccq(EXPERTS, n=n, k=k, order="permuted"),
    "ccq, a codebook a column": lambda n, k: make.ccq(EXPERTS, n=n, k=k, pair=None),
    "int8": lambda n, k: make.int8(EXPERTS, n=n, k=k),
    "int4": lambda n, k: make.int4(EXPERTS, n=n, k=k),
    "planes": lambda n, k: make.planes(EXPERTS, n=n, k=k, group=64),
    "grouped": lambda n, k: make.grouped(EXPERTS, n=n, k=k),
    "dense": lambda n, k: make.plain(EXPERTS, n=n, k=k),
}


def check(gate_up: Weight, down: Weight, ids: torch.Tensor, dtype: torch.dtype, tolerance: float) -> torch.Tensor:
    """Compare with the reference in fp32 on the decoded weights; returns what was computed."""
    tokens, top_k = ids.shape
    x = torch.randn(tokens, make.dense(gate_up).shape[-1], dtype=dtype)
    share = torch.rand(tokens, top_k)
    first, second = (prepare(w, dtype=dtype, device=make.CPU) for w in (gate_up, down))
    got = fused_moe(x, first, second, share, ids)
    decoded = (DensePrepared.of(make.dense(w)) for w in (gate_up, down))
    want = reference.fused_moe(x.float(), *decoded, share.to(dtype), ids)
    assert got.dtype == dtype
    assert float((got.float() - want).abs().max()) < tolerance * float(want.abs().max())
    assert torch.equal(got, fused_moe(x, first, second, share, ids))  # the same bits every time
    return got


def choose(tokens: int, top_k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(tokens)])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.float16, 3e-3)])
def test_a_few_tokens(name, dtype, tolerance):
    torch.manual_seed(0)
    gate_up, down = FORMATS[name](256, 128), FORMATS[name](128, 128)
    if dtype == torch.float16 and name == "dense":
        gate_up, down = (DenseWeight(make.dense(w).to(dtype)) for w in (gate_up, down))
    check(gate_up, down, choose(3, 2), dtype, tolerance)


def test_one_token_with_every_expert():
    torch.manual_seed(1)
    check(make.ccq(EXPERTS, n=128, k=64), make.ccq(EXPERTS, n=64, k=64), choose(1, EXPERTS), torch.float32, 4e-6)


def test_all_tokens_at_one_expert_and_the_others_empty():
    torch.manual_seed(2)
    ids = torch.full((19, 1), 3)
    check(make.int8(EXPERTS, n=64, k=64), make.int8(EXPERTS, n=64, k=32), ids, torch.float32, 4e-6)


def test_many_tokens():
    torch.manual_seed(3)
    check(make.ccq(EXPERTS, n=128, k=64), make.ccq(EXPERTS, n=64, k=64), choose(60, 3), torch.float32, 4e-6)


def test_parts_of_different_formats():
    torch.manual_seed(4)
    gate_up, down = make.split(EXPERTS, n=128, k=192), make.ccq(EXPERTS, n=192, k=64, order="permuted")
    check(gate_up, down, choose(3, 2), torch.float32, 4e-6)


def test_sizes_that_fill_no_program():
    torch.manual_seed(5)
    gate_up, down = make.plain(EXPERTS, n=2 * 64, k=71), make.ccq(EXPERTS, n=71, k=64)
    check(gate_up, down, choose(3, 2), torch.float32, 4e-6)


def test_no_tokens():
    prepared = prepare(make.int8(EXPERTS, n=64, k=32), dtype=torch.float32, device=make.CPU)
    down = prepare(make.int8(EXPERTS, n=32, k=32), dtype=torch.float32, device=make.CPU)
    ids = torch.zeros((0, 2), dtype=torch.int64)
    assert fused_moe(torch.zeros(0, 32), prepared, down, torch.zeros(0, 2), ids).shape == (0, 32)
