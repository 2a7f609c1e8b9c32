"""Every weight format decodes to what its page says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import ops
from kernels.operands import CcqWeight, DenseWeight, Int4Weight, Int8Weight
from kernels.reference import dequantize

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CPU = torch.device("cpu")


def ccq(arrays, row_order: str, groups: slice = slice(None)) -> CcqWeight:
    return CcqWeight(
        codes=torch.from_numpy(arrays["quant_weight"]),
        group_scales=torch.from_numpy(arrays["weight_scale"]),
        super_scales=torch.from_numpy(arrays["super_scales"]).bfloat16(),
        code_scale=torch.from_numpy(arrays["code_scale"]),
        code_zp=torch.from_numpy(arrays["code_zp"]),
        row_order=row_order,
    )


@pytest.mark.parametrize("row_order", ["plain", "permuted"])
@pytest.mark.parametrize("file", ["wint2_a", "wint2_b"])
def test_ccq_decodes_to_what_the_published_decoder_gives(file, row_order):
    arrays = np.load(GOLDEN / f"{file}.npz")
    expected = torch.from_numpy(arrays[row_order]).transpose(-1, -2)  # [E, N, K]
    assert torch.equal(dequantize(ccq(arrays, row_order), torch.bfloat16).float(), expected)


@pytest.mark.parametrize("row_order", ["plain", "permuted"])
def test_ccq_with_an_odd_number_of_groups_ignores_the_last_nibble(row_order):
    whole = ccq(np.load(GOLDEN / "wint2_a.npz"), row_order)  # K = 256, four groups
    scales = whole.group_scales[:, :2].clone()
    scales[:, 1] |= 0x0F
    cut = CcqWeight(whole.codes[:, :48], scales, whole.super_scales, whole.code_scale, whole.code_zp, row_order)
    assert torch.equal(dequantize(cut, torch.float32), dequantize(whole, torch.float32)[..., :192])


def test_int8_is_value_times_scale_of_its_output_feature():
    weight = Int8Weight(torch.tensor([[-128, 0, 127], [1, 2, 3]], dtype=torch.int8), torch.tensor([0.5, 0.25]))
    assert dequantize(weight, torch.float32).tolist() == [[-64.0, 0.0, 63.5], [0.25, 0.5, 0.75]]


def test_int4_takes_the_low_nibble_first():
    weight = Int4Weight(torch.tensor([[0x0F, 0x80]], dtype=torch.uint8), torch.tensor([2.0]))
    assert dequantize(weight, torch.float32).tolist() == [[14.0, -16.0, -16.0, 0.0]]


def test_stacked_experts_decode_like_each_alone():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, (3, 6, 10), generator=generator, dtype=torch.int8)
    packed = torch.randint(0, 256, (3, 6, 5), generator=generator, dtype=torch.uint8)
    scale = torch.rand(3, 6, generator=generator).bfloat16()
    for kind, data in ((Int8Weight, values), (Int4Weight, packed)):
        stacked = dequantize(kind(data, scale), torch.bfloat16)
        assert stacked.shape == (3, 6, 10)
        for e in range(3):
            assert torch.equal(stacked[e], dequantize(kind(data[e], scale[e]), torch.bfloat16))


def test_one_rounding_only():
    # 3 * 0.3359375 rounds differently if the scale or the value were rounded on the way.
    scale = torch.tensor([0.3359375], dtype=torch.bfloat16)
    weight = Int8Weight(torch.arange(-127, 128, dtype=torch.int8).unsqueeze(0), scale)
    exact = torch.arange(-127, 128).double() * scale.double()
    assert torch.equal(dequantize(weight, torch.bfloat16)[0], exact.bfloat16())


def test_prepare_computes_with_the_decoded_weight():
    generator = torch.Generator().manual_seed(1)
    weight = Int8Weight(torch.randint(-128, 128, (6, 10), generator=generator, dtype=torch.int8), torch.rand(6))
    prepared = ops.prepare(weight, dtype=torch.float32, device=CPU)
    x = torch.randn(3, 10, generator=generator)
    assert (prepared.in_features, prepared.out_features) == (10, 6)
    torch.testing.assert_close(ops.linear(x, prepared), x @ dequantize(weight, torch.float32).T)


def test_prepare_keeps_a_dense_weight_where_it_is():
    weight = torch.randn(6, 10)
    assert ops.prepare(DenseWeight(weight), dtype=torch.float32, device=CPU).weight.data_ptr() == weight.data_ptr()


def test_what_is_not_a_weight_is_refused():
    with pytest.raises(TypeError, match=r"Tensor is not a weight operand; see kernels\.operands"):
        ops.prepare(torch.zeros(2, 2), dtype=torch.float32, device=CPU)
