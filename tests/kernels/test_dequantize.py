"""Every weight format decodes to what its page says."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import ops
from kernels.operands import BitplaneWeight, CcqWeight, DenseWeight, GroupedWeight, Int4Weight, Int8Weight
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


def test_bit_planes_add_their_coefficients_c0_last():
    # K = 64 (two groups of 32), two planes, one column: row t has the bits of t.
    word = [sum(((t >> i) & 1) << t for t in range(32)) for i in range(2)]
    planes = torch.tensor([word, word]).to(torch.int32).unsqueeze(-1)  # [2, 2, 1]
    coefficients = torch.tensor([[1.0, 2.0, -4.0], [0.5, 8.0, 16.0]]).bfloat16().unsqueeze(-1)  # [2, 3, 1]
    expected = [-4.0, -3.0, -2.0, -1.0] * 8 + [16.0, 16.5, 24.0, 24.5] * 8
    assert dequantize(BitplaneWeight(planes, coefficients), torch.bfloat16).tolist() == [expected]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grouped_integers_are_code_less_zero_times_scale(bits):
    top = 2**bits - 1
    words = torch.full((bits, 1), -1, dtype=torch.int32)  # 32 rows of the largest code
    words[0] = -(2**bits)  # the first row is 0
    weight = GroupedWeight(words, torch.tensor([[3]], dtype=torch.uint8), torch.tensor([[0.5]]).half(), bits)
    assert dequantize(weight, torch.float32).tolist() == [[-1.5] + [(top - 3) / 2] * 31]


def test_stacked_planes_and_groups_decode_like_each_alone():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (3, 4, 2, 5), generator=generator).to(torch.int32)
    coefficients = torch.randn(3, 2, 3, 5, generator=generator).bfloat16()
    zeros = torch.randint(0, 16, (3, 1, 5), generator=generator).to(torch.uint8)
    for stack in (
        BitplaneWeight(words, coefficients),
        GroupedWeight(words[:, :, 0], zeros, coefficients[:, :1, 0], 4),
    ):
        stacked = dequantize(stack, torch.bfloat16)
        assert stacked.shape[:2] == (3, 5)
        for e in range(3):
            parts = {f.name: getattr(stack, f.name) for f in fields(stack)}
            alone = replace(stack, **{name: t[e] for name, t in parts.items() if isinstance(t, torch.Tensor)})
            assert torch.equal(stacked[e], dequantize(alone, torch.bfloat16))


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
