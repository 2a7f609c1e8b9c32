"""WINT2 decoding against data made with FastDeploy's arithmetic, element for element."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.quantization import wint2, wint4, wint8

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def load(name: str) -> dict[str, Tensor]:
    data = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.from_numpy(data[key]) for key in data}


@pytest.mark.parametrize("file", ["wint2_a", "wint2_b"])
@pytest.mark.parametrize("row_order", ["plain", "permuted"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_dequantize_equals_golden(file: str, row_order: Literal["plain", "permuted"], dtype: torch.dtype) -> None:
    golden = load(file)
    weight = wint2.dequantize(
        golden["quant_weight"].view(dtype),
        golden["weight_scale"].view(dtype),
        golden["super_scales"].bfloat16(),
        golden["code_scale"],
        golden["code_zp"],
        row_order=row_order,
    )
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.float(), golden[row_order])


def test_leading_dimensions_are_a_stack() -> None:
    golden = load("wint2_a")
    names = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
    whole = wint2.dequantize(*(golden[name] for name in names), row_order="plain")
    alone = wint2.dequantize(*(golden[name][1] for name in names), row_order="plain")
    nested = wint2.dequantize(*(golden[name][:, None] for name in names), row_order="plain")
    assert torch.equal(whole[1], alone)
    assert torch.equal(nested[:, 0], whole)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize(("module", "bits"), [(wint8, 8), (wint4, 4)])
def test_integer_formats_come_within_half_a_step_of_the_weights(size: str, module: object, bits: int) -> None:
    golden = load(f"weight_only_{size}")
    scale = golden[f"int{bits}_weight_scale"]
    weight = module.dequantize(golden[f"int{bits}_quant_weight"], scale)  # type: ignore[attr-defined]
    exact = golden["weight_fp16"].float()
    bf16_rounding = exact.abs() * 2.0**-8
    assert ((weight.float() - exact).abs() <= 0.51 * scale.float() + bf16_rounding).all()
