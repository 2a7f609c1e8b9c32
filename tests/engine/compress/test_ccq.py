"""The CCQ encoder: how good it is, and that the format's decoder agrees with it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from engine.compress import ccq
from engine.compress.packed import relative_error
from engine.errors import UnsupportedError
from engine.quantization import wint2


def gaussian(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("row_order", ["plain", "permuted"])
def test_error_on_gaussian_weights(seed: int, row_order: Literal["plain", "permuted"]) -> None:
    weight = gaussian(64, 512, seed) * 0.03
    packed = ccq.quantize(weight, row_order=row_order)
    # .106 is the best known for a 256-word codebook and real scales, .099 the limit of any; .12 allows for rounding.
    assert 0.099 < relative_error(weight, packed) < 0.12


def test_groups_of_very_different_size_keep_their_own_scale() -> None:
    size = torch.linspace(0.25, 1, 8).repeat_interleave(64)
    weight = gaussian(32, 512) * size
    assert relative_error(weight, ccq.quantize(weight)) < 0.13


def test_tensors_are_those_of_the_format() -> None:
    weight = gaussian(12, 320)  # five groups: the last nibble is unused
    packed = ccq.quantize(weight)
    specs = wint2.Wint2(row_order="plain").tensors(320, 12)
    assert {name: tuple(tensor.shape) for name, tensor in packed.tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    assert [packed.tensors[name].dtype for name in specs] == [
        torch.uint8,
        torch.uint8,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())
    arguments: dict[str, Any] = packed.tensors
    assert torch.equal(wint2.dequantize(**arguments, row_order="plain").T, packed.dequantize())


def test_bits_per_weight_count_all_tensors() -> None:
    packed = ccq.quantize(gaussian(16, 256))
    assert packed.bits_per_weight == pytest.approx(2 + 4 / 64 + 80 / 256)


def test_every_byte_is_the_best_under_its_scale() -> None:
    weight = gaussian(4, 128)
    packed = ccq.quantize(weight)
    best = (packed.dequantize().float() - weight).square().view(4, 32, 4).sum(dim=-1)  # [N, words]
    for byte in range(256):
        tensors: dict[str, Any] = packed.tensors | {"quant_weight": torch.full((32, 4), byte, dtype=torch.uint8)}
        other = wint2.dequantize(**tensors, row_order="plain").T.float()
        # The search is in fp32 and the decoded weight in bf16, hence the allowance for ties.
        assert (best <= (other - weight).square().view(4, 32, 4).sum(dim=-1) * 1.02 + 1e-4).all()


def test_important_inputs_get_the_smaller_errors() -> None:
    weight = gaussian(32, 256)
    importance = torch.ones(256)
    importance[::4] = 30.0
    error = (ccq.quantize(weight, torch.diag(importance)).dequantize().float() - weight).square()
    plain = (ccq.quantize(weight).dequantize().float() - weight).square()
    assert error[:, ::4].mean() < 0.5 * plain[:, ::4].mean()
    assert (importance * error).sum() < (importance * plain).sum()


def test_a_zero_column_stays_zero() -> None:
    weight = gaussian(4, 128)
    weight[1] = 0
    decoded = ccq.quantize(weight).dequantize()
    assert not decoded[1].any()
    assert decoded.isfinite().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="wint2 needs K in multiples of 64; found K=96"):
        ccq.quantize(torch.zeros(4, 96))
    with pytest.raises(UnsupportedError, match=r"hessian \[3, 3\]; expected \[64, 64\]"):
        ccq.quantize(torch.zeros(4, 64), torch.eye(3))
