"""The CCQ encoder: how good it is, and that the format's decoder agrees with it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from engine.compress import ccq
from engine.compress.ccq import CcqOptions
from engine.compress.codebook import CODE, PAIRS, WHOLE_RANGE
from engine.compress.feedback import output_error
from engine.compress.hessian import Metric
from engine.compress.packed import PackedWeight, relative_error
from engine.errors import CheckpointError, ConfigError, UnsupportedError
from engine.quantization import wint2

PLAIN = CcqOptions(
    search_again=False, feedback=False, metric=False, running_scales=False, heavy_first=False, beams=1, sweeps=0
)
FEEDBACK = replace(PLAIN, search_again=True, feedback=True)
RUNNING = replace(FEEDBACK, metric=True, running_scales=True)
BEAMS = replace(RUNNING, beams=4)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def layer(out_features: int = 64, in_features: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian weights, and X X^T of correlated inputs of unequal size, two of them never active."""
    basis, _ = torch.linalg.qr(gaussian(in_features, in_features, seed + 1))
    spectrum = torch.arange(1, in_features + 1) ** -0.6
    size = torch.linspace(-1, 1, in_features)[
        torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))
    ].exp()
    inputs = gaussian(4 * in_features, in_features, seed + 2) * spectrum @ basis.T * size
    inputs[:, [3, 70]] = 0
    return gaussian(out_features, in_features, seed) * 0.03, inputs.T @ inputs


def error(weight: Tensor, packed: PackedWeight, hessian: Tensor) -> float:
    return output_error(weight, packed.dequantize(), Metric.of(hessian, weight.shape[1], device=weight.device))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("row_order", ["plain", "permuted"])
def test_error_on_gaussian_weights(seed: int, row_order: Literal["plain", "permuted"]) -> None:
    weight = gaussian(64, 512, seed) * 0.03
    packed = ccq.quantize(weight, row_order=row_order)
    # .099 is the limit of any 256-word codebook in four dimensions, were the scales real numbers.
    assert 0.099 < relative_error(weight, packed) < 0.11


@pytest.mark.parametrize("seed", [0, 1])
def test_each_step_reduces_the_error(seed: int) -> None:
    weight, hessian = layer(seed=10 * seed)
    again = replace(PLAIN, search_again=True)
    steps = [
        error(weight, ccq.quantize(weight, hessian, code=code, options=options), hessian)
        for code, options in (
            (WHOLE_RANGE, PLAIN),
            (CODE, PLAIN),
            (CODE, again),
            (CODE, FEEDBACK),
            (CODE, replace(FEEDBACK, metric=True)),
            (CODE, BEAMS),
            (CODE, replace(BEAMS, sweeps=1)),
            (CODE, replace(BEAMS, sweeps=3)),
        )
    ]
    assert all(later < earlier for earlier, later in pairwise(steps)), steps
    assert steps[3] < 0.6 * steps[2]
    assert steps[-1] < 0.25 * steps[0]


def test_more_ways_are_better() -> None:
    weight, hessian = layer()
    one, four, sixteen = (
        error(weight, ccq.quantize(weight, hessian, options=replace(RUNNING, beams=beams)), hessian)
        for beams in (1, 4, 16)
    )
    assert sixteen < four < one


def test_both_row_orders_are_as_good() -> None:
    weight, hessian = layer()
    plain, permuted = (ccq.quantize(weight, hessian, row_order=order) for order in ("plain", "permuted"))
    assert error(weight, permuted, hessian) == pytest.approx(error(weight, plain, hessian), rel=0.1)
    assert plain.weight_format == wint2.Wint2("plain")
    assert permuted.weight_format == wint2.Wint2("permuted")


def test_a_permuted_hessian_gives_the_plain_bytes() -> None:
    weight, hessian = layer()
    logical = wint2.stored_rows(torch.arange(256).view(-1, 64), "permuted").flatten()
    packed = ccq.quantize(weight, hessian, row_order="permuted")
    stored = ccq.quantize(weight[:, logical], hessian[logical][:, logical], row_order="plain")
    assert all(torch.equal(packed.tensors[name], stored.tensors[name]) for name in stored.tensors)


def test_tensors_are_those_of_the_format() -> None:
    weight = gaussian(12, 320)  # five groups: the last nibble is unused
    packed = ccq.quantize(weight, torch.eye(320))
    specs = wint2.Wint2(row_order="plain").tensors(320, 12)
    assert {name: tuple(tensor.shape) for name, tensor in packed.tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    dtypes = [torch.uint8, torch.uint8, torch.bfloat16, torch.float32, torch.float32]
    assert [packed.tensors[name].dtype for name in specs] == dtypes
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())
    arguments: dict[str, Any] = packed.tensors
    assert torch.equal(wint2.dequantize(**arguments, row_order="plain").T, packed.dequantize())
    assert packed.bits_per_weight == pytest.approx(2 + 4 * 6 / 320 + 80 / 320)


def test_one_pair_for_the_tensor_unless_columns_choose() -> None:
    weight, hessian = layer(out_features=32)
    options = replace(RUNNING, heavy_first=True)
    shared = ccq.quantize(weight, hessian, options=options)
    assert {(float(a), float(b)) for a, b in zip(*_code(shared), strict=True)} == {_single(CODE)}
    own = ccq.quantize(weight, hessian, options=options, codebook="column")
    used = {(float(a), float(b)) for a, b in zip(*_code(own), strict=True)}
    assert len(used) > 1
    assert used <= {_single(pair) for pair in PAIRS}
    assert error(weight, own, hessian) < error(weight, shared, hessian)


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
    squares = (ccq.quantize(weight, torch.diag(importance)).dequantize().float() - weight).square()
    plain = (ccq.quantize(weight).dequantize().float() - weight).square()
    assert squares[:, ::4].mean() < 0.5 * plain[:, ::4].mean()
    assert (importance * squares).sum() < (importance * plain).sum()


@pytest.mark.parametrize("given", [True, False])
def test_zero_columns_zero_groups_and_outliers(given: bool) -> None:
    weight, hessian = layer(out_features=8)
    weight[1] = 0
    weight[2, :64] = 0
    weight[3, 17] = 1e4
    weight[4] *= 1e30
    weight[5] *= 1e-30
    decoded = ccq.quantize(weight, hessian if given else None).dequantize().float()
    assert decoded.isfinite().all()
    assert not decoded[1].any()
    h = Metric.of(hessian if given else None, 256, device=weight.device).matrix.double()
    off, full = decoded.double() - weight.double(), weight.double()
    relative = (off @ h * off).sum(dim=1) / (full @ h * full).sum(dim=1)
    assert (relative[[0, 4, 5, 6, 7]] < 0.15).all()
    # No vector is 0, so reaching an outlier costs the rest of its group; an all-zero group likewise costs something.
    assert (relative[[2, 3]] < 0.6).all()


def test_the_same_input_gives_the_same_bytes_and_rows_do_not_meet() -> None:
    weight, hessian = layer(out_features=48)
    first, second = ccq.quantize(weight, hessian), ccq.quantize(weight.clone(), hessian.clone())
    part = ccq.quantize(weight[:16], Metric.of(hessian, 256, device=weight.device))
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    agree = (first.tensors["quant_weight"][:, :16] == part.tensors["quant_weight"]).float().mean()
    assert agree > 0.9  # not all: products of other shapes round otherwise


def test_what_can_not_be_encoded_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"K in multiples of 64; found K=96.*bf16"):
        ccq.quantize(torch.zeros(4, 96))
    with pytest.raises(ConfigError, match=r"hessian \[3, 3\]; expected \[64, 64\]"):
        ccq.quantize(torch.zeros(4, 64), torch.eye(3))
    broken = torch.zeros(4, 64)
    broken[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        ccq.quantize(broken)
    with pytest.raises(ConfigError, match="Hessian has 1 rows"):
        ccq.quantize(torch.zeros(4, 64), torch.diag(broken[0]))
    with pytest.raises(ConfigError, match="code pair"):
        ccq.quantize(torch.zeros(4, 64), code=(float("nan"), 0.0))
    with pytest.raises(ConfigError, match="needs metric and feedback"):
        CcqOptions(feedback=False)


def _code(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    return packed.tensors["code_scale"], packed.tensors["code_zp"]


def _single(pair: tuple[float, float]) -> tuple[float, float]:
    scale, zero = torch.tensor(pair, dtype=torch.float32).tolist()
    return scale, zero
