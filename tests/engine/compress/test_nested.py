"""Nested planes: every reading is worth something, and better than planes chosen one precision after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from correlated_layers import Layer, correlated_layer

from engine.compress import bpdq, nested
from engine.compress.feedback import output_error
from engine.compress.packed import PackedWeight
from engine.errors import ConfigError, UnsupportedError
from engine.quantization.bitplane import Bitplane


def reading_errors(layer: Layer, packed: PackedWeight) -> list[float]:
    """Output error of reading 2, 3 and 4 planes."""
    assert isinstance(packed.weight_format, Bitplane)
    formats = [replace(packed.weight_format, read_planes=count) for count in (2, 3, 4)]
    return [output_error(layer.weight, f.dequantize(packed.tensors).T, layer.metric) for f in formats]


@pytest.mark.parametrize("seed", [0, 1])
def test_two_planes_cost_little_and_the_others_beat_adding_planes_afterwards(seed: int) -> None:
    layer = correlated_layer(32, 256, seed=seed)
    metric = layer.metric
    found = reading_errors(layer, nested.quantize(layer.weight, metric))
    alone = output_error(layer.weight, bpdq.quantize(layer.weight, metric).dequantize(), metric)
    given = torch.empty((256, 0, 32))
    added = []
    for planes in (2, 3, 4):
        chosen = bpdq.choose_planes(layer.weight, metric, given, planes=planes, group_size=64, iterations=10)
        given = chosen.bits
        added.append(chosen.error / float(((layer.weight @ metric.matrix) * layer.weight).sum()))
    assert found[0] < 1.1 * alone
    assert found[1] < 0.95 * added[1] < 0.95 * 0.6 * added[0]
    assert found[2] < 0.9 * added[2] < 0.9 * 0.7 * added[1]


def test_importance_moves_error_from_one_reading_to_the_others() -> None:
    layer = correlated_layer(32, 192, seed=0)
    two_first, alike = (
        reading_errors(layer, nested.quantize(layer.weight, layer.metric, importance=importance))
        for importance in ((1.0, 1.0, 1.0), (1.0, 4.0, 16.0))
    )
    assert two_first[0] < 0.95 * alike[0]
    assert alike[1] < 0.97 * two_first[1]
    assert alike[2] < 0.85 * two_first[2]


def test_tensors_are_those_of_the_format() -> None:
    layer = correlated_layer(12, 128, seed=0)
    packed = nested.quantize(layer.weight, layer.hessian, group_size=64)
    specs = packed.weight_format.tensors(128, 12)
    assert {name: tuple(tensor.shape) for name, tensor in packed.tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    assert packed.bits_per_weight == 4 + 16 * (3 + 4 + 5) / 64
    again = nested.quantize(layer.weight, layer.hessian, group_size=64)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in packed.tensors.items())


def test_inputs_that_were_never_active_and_rows_of_zeros_do_no_harm() -> None:
    layer = correlated_layer(8, 128, seed=0)
    hessian, weight = layer.hessian.clone(), layer.weight.clone()
    hessian[:70], hessian[:, :70] = 0, 0
    weight[2] = 0
    packed = nested.quantize(weight, hessian)
    for count in (2, 3, 4):
        decoded = replace(packed.weight_format, read_planes=count).dequantize(packed.tensors)
        assert decoded.isfinite().all()
        assert not decoded[:, 2].any()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="group_size 64 needs K in multiples of 64; found K=32"):
        nested.quantize(torch.zeros(4, 32))
    with pytest.raises(ConfigError, match="expected three positive numbers"):
        nested.quantize(torch.zeros(4, 64), importance=(1, 0, 1))
    with pytest.raises(ConfigError, match="Hessian has 1 rows with values that are not finite"):
        nested.quantize(torch.zeros(4, 64), torch.diag(torch.tensor([torch.nan, *[1.0] * 63])))
