"""Round-to-nearest encoders against Paddle's own output."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from correlated_layers import exact
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import paddle_layout
from engine.compress import rtn
from engine.compress.packed import relative_error
from engine.errors import UnsupportedError

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("bits", [8, 4])
def test_agrees_with_paddle_but_for_rounding(size: str, bits: Literal[4, 8]) -> None:
    data = np.load(GOLDEN / f"weight_only_{size}.npz")
    weight = torch.from_numpy(data["weight_fp16"]).float()  # [K, N]
    packed = rtn.quantize(weight.T, bits=bits)
    scale = torch.from_numpy(data[f"int{bits}_weight_scale"]).float()
    assert torch.allclose(packed.tensors["weight_scale"].float(), scale, rtol=2**-8, atol=0)
    decode = getattr(paddle_layout, f"decode_int{bits}")
    stored = torch.from_numpy(data[f"int{bits}_quant_weight"])
    assert packed.tensors["quant_weight"].shape == stored.shape
    assert packed.tensors["quant_weight"].dtype == torch.int8
    steps = (decode(packed.tensors["quant_weight"]).int() - decode(stored).int()).abs()
    # Our scale is rounded to bf16 (2^-9 relative), Paddle's here to fp16: up to 127 * 2^-9 = 1/4 step apart.
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < (0.15 if bits == 8 else 0.02)


@pytest.mark.parametrize("bits", [8, 4])
def test_error_is_within_half_a_step(bits: Literal[4, 8]) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    packed = rtn.quantize(weight, bits=bits)
    scale = packed.tensors["weight_scale"].float()[:, None]
    largest = 127 if bits == 8 else 7
    clipped = (weight.abs() - largest * scale).clamp(min=0)  # the bf16 scale may have been rounded down
    error = (packed.dequantize().float() - weight).abs()
    assert (error <= 0.5 * scale + clipped + weight.abs() * 2**-8).all()
    assert not packed.dequantize()[3].any()
    assert packed.bits_per_weight == pytest.approx(bits + 16 / 128)


def test_a_shape_without_a_layout_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="wint8 needs K in multiples of 64"):
        rtn.quantize(torch.zeros(4, 100))


@settings(deadline=None, max_examples=25)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_every_group_spans_its_values_and_a_searched_grid_is_no_worse(
    bits: Literal[2, 4, 8], group_size: int, shift: float, seed: int
) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)) + shift
    spanning, clipped = (rtn.quantize(weight, bits=bits, group_size=group_size, clip=clip) for clip in (False, True))
    groups = weight.view(16, -1, group_size)
    step = (groups.amax(dim=2).clamp(min=0) - groups.amin(dim=2).clamp(max=0)) / (2**bits - 1)
    error = (exact(spanning) - weight).abs().view_as(groups)
    # The zero point is rounded: values at an end may lie half a step outside, besides the half step of rounding.
    assert (error <= step[..., None] * 1.01).all()
    assert (exact(clipped) - weight).square().sum() <= (exact(spanning) - weight).square().sum()


def test_two_bits_in_groups() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    spanning, clipped = (rtn.quantize(weight, bits=2, group_size=64, clip=clip) for clip in (False, True))
    assert spanning.bits_per_weight == clipped.bits_per_weight == 2 + (16 + 2) / 64
    # A Gaussian's best four evenly spaced levels have .119; a grid that has to hold 0 has more.
    assert 0.119 < relative_error(weight, clipped) < 0.16 < relative_error(weight, spanning)


def test_inputs_of_weight_get_the_better_fitting_grid() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[:8] = 50
    plain, weighted = (
        (rtn.quantize(weight, hessian, bits=2, group_size=64, clip=True).dequantize().float() - weight).square()
        for hessian in (None, torch.diag(importance))
    )
    assert (importance * weighted).sum() < 0.8 * (importance * plain).sum()
