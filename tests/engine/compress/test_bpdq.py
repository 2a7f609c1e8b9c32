"""BPDQ: its fits are the best, its error is that of its bytes, and it orders with GPTQ as published."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from correlated_layers import correlated_layer, exact, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.compress import bpdq, gptq
from engine.compress.bitplanes import Group
from engine.compress.feedback import output_error
from engine.errors import CheckpointError, ConfigError, UnsupportedError


def random_group(size: int, rows: int, seed: int, given: int = 0) -> tuple[Group, torch.Tensor]:
    """A group of a random metric, and its U."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator).triu(1) * 0.2 + torch.diag(
        torch.rand(size, generator=generator) + 0.5
    )
    bits = torch.randint(0, 2, (size, given, rows), generator=generator).float()
    return Group.of(torch.randn(size, rows, generator=generator), factor, bits), factor


@settings(deadline=None, max_examples=12)
@given(
    planes=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([32, 64, 128]),
    iterations=st.integers(0, 4),
    sweeps=st.sampled_from([0, 0, 1]),
    seed=st.integers(0, 9),
)
def test_the_error_it_counts_is_that_of_the_packed_bytes(
    planes: Literal[2, 3, 4], group_size: int, iterations: int, sweeps: int, seed: int
) -> None:
    layer = correlated_layer(12, 256, seed=seed)
    metric = layer.metric
    none = torch.empty((256, 0, 12))
    options: dict[str, Any] = {"group_size": group_size, "iterations": iterations, "sweeps": sweeps}
    chosen = bpdq.choose_planes(layer.weight, metric, none, planes=planes, **options)
    packed = bpdq.quantize(layer.weight, metric, planes=planes, **options)
    assert packed.bits_per_weight == planes + 16 * (planes + 1) / group_size
    assert chosen.error == pytest.approx(squared_error(layer.weight, exact(packed), metric), rel=1e-3)


@settings(deadline=None, max_examples=25)
@given(planes=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_fit_is_the_least_squares_solution(planes: int, seed: int) -> None:
    group, factor = random_group(32, 5, seed)
    bits = torch.randint(0, 2, (32, planes, 5), generator=torch.Generator().manual_seed(seed)).float()
    coefficients, errors = group.fit(bits)
    whitener = torch.linalg.inv(factor.double()).T
    for row in range(5):
        design = torch.cat((bits[..., row].double(), torch.ones(32, 1, dtype=torch.float64)), dim=1)
        goal = whitener @ group.target[:, row].double()
        best = torch.linalg.lstsq(whitener @ design, goal[:, None]).solution[:, 0]
        torch.testing.assert_close(coefficients[:, row].double(), best, rtol=1e-2, atol=1e-2)
        left = goal - whitener @ design @ coefficients[:, row].double()
        torch.testing.assert_close(errors[:, row].double(), left, rtol=1e-3, atol=1e-4)
    assert torch.equal(coefficients, coefficients.bfloat16().float())


@settings(deadline=None, max_examples=25)
@given(planes=st.integers(2, 4), given=st.integers(0, 2), iterations=st.integers(0, 6), seed=st.integers(0, 99))
def test_more_iterations_are_never_worse_and_given_planes_stay(
    planes: int, given: int, iterations: int, seed: int
) -> None:
    group, _ = random_group(32, 20, seed, given)
    few, more = (group.solve(planes, iterations=count) for count in (iterations, iterations + 2))
    assert torch.equal(more.bits[:, :given], group.given)
    assert ((more.bits == 0) | (more.bits == 1)).all()
    assert (more.errors.square().sum(dim=0) <= few.errors.square().sum(dim=0) * 1.001).all()


@pytest.mark.parametrize("seed", range(5))
def test_it_orders_with_gptq_and_group_sizes_as_published(seed: int) -> None:
    layer = correlated_layer(32, 512, seed=seed)
    metric = layer.metric

    def error(packed: bpdq.PackedWeight) -> float:
        return output_error(layer.weight, packed.dequantize(), metric)

    spanning, clipped = (error(gptq.quantize(layer.weight, metric, clip=clip)) for clip in (False, True))
    by_size = [error(bpdq.quantize(layer.weight, metric, group_size=size)) for size in (64, 128, 256)]
    three = error(bpdq.quantize(layer.weight, metric, planes=3, group_size=128))
    assert three < 0.35 * by_size[1]
    assert by_size[0] < by_size[1] < by_size[2]
    assert by_size[0] < 0.9 * clipped < 0.9 * 0.6 * spanning


def test_a_sweep_makes_no_row_worse_and_helps() -> None:
    layer = correlated_layer(32, 256, seed=0)
    errors = []
    for sweeps in (0, 1, 3):
        off = exact(bpdq.quantize(layer.weight, layer.hessian, sweeps=sweeps)) - layer.weight
        errors.append(((off @ layer.metric.matrix) * off).sum(dim=1))
    for before, after in pairwise(errors):
        assert (after <= before * 1.001).all()
        assert after.sum() < 0.99 * before.sum()


def test_all_related_inputs_of_a_group_are_chosen_together() -> None:
    layer = correlated_layer(32, 128, seed=0)
    related = output_error(layer.weight, bpdq.quantize(layer.weight, layer.hessian).dequantize(), layer.metric)
    alone = output_error(layer.weight, bpdq.quantize(layer.weight).dequantize(), layer.metric)
    assert related < 0.7 * alone


def test_inputs_that_were_never_active_and_equal_weights_do_no_harm() -> None:
    layer = correlated_layer(16, 128, seed=0)
    hessian, weight = layer.hessian.clone(), layer.weight.clone()
    hessian[:70], hessian[:, :70] = 0, 0  # a whole group and some of the next
    weight[2], weight[3] = 0, 0.5
    decoded = bpdq.quantize(weight, hessian).dequantize().float()
    assert decoded.isfinite().all()
    assert not decoded[2].any()
    torch.testing.assert_close(decoded[3], weight[3], rtol=1e-2, atol=0)
    assert bpdq.quantize(weight, torch.zeros(128, 128)).dequantize().isfinite().all()


def test_runs_repeat_and_chunks_of_rows_join() -> None:
    layer = correlated_layer(1032, 64, seed=0)
    packed = bpdq.quantize(layer.weight, layer.hessian)
    again = bpdq.quantize(layer.weight, layer.hessian)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in packed.tensors.items())
    last = bpdq.quantize(layer.weight[-8:], layer.hessian).dequantize().float()
    whole = packed.dequantize()[-8:].float()
    errors = [output_error(layer.weight[-8:], decoded, layer.metric) for decoded in (last, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"group_size 64 needs K in multiples of 64; found K=32.*K=32 fits"):
        bpdq.quantize(torch.zeros(4, 32))
    with pytest.raises(ConfigError, match="Hessian has 1 rows with values that are not finite"):
        bpdq.quantize(torch.zeros(4, 64), torch.diag(torch.tensor([torch.nan, *[1.0] * 63])))
    with pytest.raises(ConfigError, match=r"hessian \[3, 3\]; expected \[64, 64\]"):
        bpdq.quantize(torch.zeros(4, 64), torch.eye(3))
    with pytest.raises(CheckpointError, match="weight holds values that are not finite"):
        bpdq.quantize(torch.full((4, 64), torch.nan))
