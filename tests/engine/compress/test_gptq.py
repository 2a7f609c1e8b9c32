"""GPTQ: the error it counts is that of its bytes, and feedback and a searched grid earn their cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from correlated_layers import correlated_layer, exact, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.compress import gptq, rtn
from engine.compress.feedback import group_order, output_error
from engine.compress.grid import Codes
from engine.compress.hessian import Metric
from engine.errors import CheckpointError, ConfigError, UnsupportedError


@settings(deadline=None, max_examples=15)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([32, 64, 128, None]),
    clip=st.booleans(),
    act_order=st.booleans(),
    sweeps=st.sampled_from([0, 0, 1, 2]),
    seed=st.integers(0, 9),
)
def test_the_error_it_counts_is_that_of_the_packed_bytes(
    bits: Literal[2, 4, 8], group_size: int | None, clip: bool, act_order: bool, sweeps: int, seed: int
) -> None:
    if group_size is None and bits == 2:
        bits = 4
    layer = correlated_layer(16, 256, seed=seed)
    metric = layer.metric
    kind = Codes.asymmetric(bits) if group_size else Codes.symmetric(bits)
    options: dict[str, Any] = {"group_size": group_size, "clip": clip, "act_order": act_order, "sweeps": sweeps}
    _, counted = gptq.round_with_feedback(layer.weight, metric, kind, **options)
    packed = gptq.quantize(layer.weight, metric, bits=bits, **options)
    assert counted == pytest.approx(squared_error(layer.weight, exact(packed), metric), rel=1e-3)


@pytest.mark.parametrize("group_size", [64, None])
@pytest.mark.parametrize("clip", [True, False])
def test_without_relations_between_inputs_it_rounds_to_nearest(group_size: int | None, clip: bool) -> None:
    weight = correlated_layer(16, 128, seed=0).weight
    options: dict[str, Any] = {"bits": 4, "group_size": group_size, "clip": clip}
    for hessian in (None, torch.eye(128), torch.diag(torch.linspace(1, 2, 128))):
        fed, rounded = gptq.quantize(weight, hessian, **options), rtn.quantize(weight, hessian, **options)
        for name, tensor in rounded.tensors.items():
            assert torch.equal(fed.tensors[name], tensor), name


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (4, 64), (4, None), (8, None)])
def test_feedback_beats_rounding_and_a_searched_grid_the_spanning_one(
    bits: Literal[2, 4, 8], group_size: int | None, seed: int
) -> None:
    layer = correlated_layer(64, 256, seed=seed)
    errors = {
        (encoder.__name__, clip): output_error(
            layer.weight, exact(encoder.quantize(layer.weight, layer.hessian, clip=clip, **options)), layer.metric
        )
        for options in [{"bits": bits, "group_size": group_size}]
        for encoder in (rtn, gptq)
        for clip in (False, True)
    }
    for clip in (False, True):
        assert errors[gptq.__name__, clip] < 0.7 * errors[rtn.__name__, clip]
    gain = {2: 0.6, 4: 0.85, 8: 1.0}[bits]
    assert errors[gptq.__name__, True] < gain * errors[gptq.__name__, False]


def test_beginning_with_heavy_inputs_helps_and_keeps_the_format() -> None:
    errors = dict.fromkeys((False, True), 0.0)
    for seed in range(4):
        layer = correlated_layer(64, 256, seed=seed)
        for act_order in errors:
            packed = gptq.quantize(layer.weight, layer.hessian, act_order=act_order)
            errors[act_order] += output_error(layer.weight, packed.dequantize(), layer.metric)
    assert errors[True] < errors[False]


@pytest.mark.parametrize(("bits", "group_size", "gain"), [(2, 64, 0.99), (4, None, 1.001)])
def test_a_sweep_makes_no_row_worse_and_new_grids_help(
    bits: Literal[2, 4], group_size: int | None, gain: float
) -> None:
    layer = correlated_layer(32, 256, seed=0)
    errors = []
    for sweeps in (0, 1, 3):
        packed = gptq.quantize(layer.weight, layer.hessian, bits=bits, group_size=group_size, sweeps=sweeps)
        off = exact(packed) - layer.weight
        errors.append(((off @ layer.metric.matrix) * off).sum(dim=1))
    for before, after in pairwise(errors):
        assert (after <= before * 1.001).all()
        assert after.sum() < gain * before.sum()


@settings(deadline=None, max_examples=30)
@given(groups=st.integers(1, 6), size=st.sampled_from([1, 4, 32]), seed=st.integers(0, 99))
def test_the_order_keeps_groups_whole_and_starts_with_the_heaviest(groups: int, size: int, seed: int) -> None:
    diagonal = torch.rand(groups * size, generator=torch.Generator().manual_seed(seed)) + 0.1
    order = group_order(Metric(torch.diag(diagonal)), size)
    assert torch.equal(order.sort().values, torch.arange(groups * size))
    inside = diagonal[order].view(groups, size)
    assert torch.equal(order.view(groups, size) // size, (order[::size] // size)[:, None].expand(groups, size))
    assert (inside[:, 1:] <= inside[:, :-1]).all()
    assert (inside[1:, 0] <= inside[:-1, 0]).all()


def test_inputs_that_were_never_active_do_no_harm() -> None:
    layer = correlated_layer(16, 128, seed=0)
    hessian = layer.hessian.clone()
    dead = [3, 40, 41, 100]
    hessian[dead], hessian[:, dead] = 0, 0
    for bits, group_size in ((2, 64), (4, None)):
        decoded = gptq.quantize(layer.weight, hessian, bits=bits, group_size=group_size).dequantize().float()
        assert decoded.isfinite().all()
        off = (decoded - layer.weight)[:, dead].square().sum() / layer.weight[:, dead].square().sum()
        assert off < 0.3, "they are rounded as others are"
    assert gptq.quantize(layer.weight, torch.zeros(128, 128)).dequantize().isfinite().all()


def test_rows_are_independent_and_runs_repeat() -> None:
    layer = correlated_layer(1040, 64, seed=0)  # more rows than a chunk
    packed = gptq.quantize(layer.weight, layer.hessian)
    again = gptq.quantize(layer.weight, layer.hessian)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in packed.tensors.items())
    last = gptq.quantize(layer.weight[-16:], layer.hessian)
    # Not all: products of other widths may be rounded otherwise, and a code at a border with them.
    assert (last.dequantize() == packed.dequantize()[-16:]).float().mean() > 0.98


def test_rows_of_zeros_and_of_one_sign_fit_their_grid() -> None:
    weight = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) + 1
    weight[3], weight[5] = 0, -weight[5]
    for clip in (False, True):
        decoded = gptq.quantize(weight, bits=4, clip=clip).dequantize().float()
        assert not decoded[3].any()
        assert ((decoded - weight).abs() <= 2 / 15 / 2 + 0.01).all()


def test_what_it_cannot_do_is_refused() -> None:
    weight = torch.zeros(16, 96)
    with pytest.raises(UnsupportedError, match="gptq with group_size 64 needs K in multiples of 64; found K=96"):
        gptq.quantize(weight)
    with pytest.raises(UnsupportedError, match="2 bits without groups are not supported; supported: 4, 8"):
        gptq.quantize(weight, group_size=None)
    with pytest.raises(UnsupportedError, match="wint4 needs K in multiples of 64"):
        gptq.quantize(weight, bits=4, group_size=None)
    with pytest.raises(UnsupportedError, match="gptq of 2 bits needs N in multiples of 16; found N=8"):
        gptq.quantize(torch.zeros(8, 64))
    with pytest.raises(ConfigError, match="Hessian has 1 rows with values that are not finite"):
        gptq.quantize(torch.zeros(16, 64), torch.diag(torch.tensor([torch.nan, *[1.0] * 63])))
    with pytest.raises(CheckpointError, match="weight holds values that are not finite"):
        gptq.quantize(torch.full((16, 64), torch.inf))
