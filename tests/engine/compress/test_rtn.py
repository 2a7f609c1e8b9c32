"""Round-to-nearest encoders against Paddle's own output."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from engine.checkpoint import paddle_layout
from engine.compress import rtn
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
