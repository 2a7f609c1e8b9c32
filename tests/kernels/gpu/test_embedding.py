"""Rows of a packed table are those of the decoded one, whoever holds them; and a tied head shares the memory."""

from __future__ import annotations

import pytest
import torch
import weights as make

from kernels.gpu.embedding import embedding, prepare_embedding
from kernels.gpu.linear import linear
from kernels.gpu.packed import GpuPrepared
from kernels.operands import GroupedWeight, Int8Weight

torch.set_num_threads(1)
TABLES = {
    "int8": lambda: make.int8(n=24, k=1152),
    "int4": lambda: make.grouped(n=24, k=1152, group=128),
    "int4, small groups": lambda: make.grouped(n=24, k=96, group=32),
    "2 bits": lambda: make.grouped(n=24, k=256, group=64, bits=2),
}
IDS = torch.tensor([0, 23, 4, 4, 7, 15, 8], dtype=torch.int32)


def rows(weight: Int8Weight | GroupedWeight, first: int, last: int) -> Int8Weight | GroupedWeight:
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values[first:last], weight.scale[first:last])
    return GroupedWeight(
        weight.codes[:, first:last], weight.zeros[:, first:last], weight.scales[:, first:last], weight.bits
    )


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_sum_to_those_of_the_decoded_table(name, dtype, ranks):
    torch.manual_seed(0)
    weight = TABLES[name]()
    want = make.dense(weight).to(dtype)[IDS.long()]
    share = 24 // ranks
    total = torch.zeros_like(want)
    for rank in range(ranks):
        table = prepare_embedding(rows(weight, rank * share, (rank + 1) * share), dtype=dtype, device=make.CPU)
        assert isinstance(table, GpuPrepared)
        found = embedding(IDS, table, rank * share)
        assert found.dtype == dtype
        total += found
    assert torch.equal(total, want)


def test_a_packed_table_is_a_head_too():
    torch.manual_seed(0)
    weight = make.grouped(n=24, k=256, group=128)
    table = prepare_embedding(weight, dtype=torch.float32, device=make.CPU)
    assert isinstance(table, GpuPrepared)
    x = torch.randn(3, 256)
    torch.testing.assert_close(linear(x, table), x @ make.dense(weight).t(), rtol=1e-5, atol=1e-4)


def test_dense_tables_stay_tensors_and_others_are_refused():
    assert isinstance(prepare_embedding(make.plain(n=4, k=64), dtype=torch.float32, device=make.CPU), torch.Tensor)
    with pytest.raises(TypeError, match="CcqWeight can't be an embedding table"):
        prepare_embedding(make.ccq(n=4, k=64), dtype=torch.float32, device=make.CPU)
