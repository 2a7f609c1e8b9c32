"""Cut anywhere and joined again, every operand is what it was; and the pieces asked for are those that are needed."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from baidu_repository import CONFIG, Repository
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoint.joins import join_columns, join_rows, map_tensors, tensors
from engine.checkpoint.partition import MatrixCut, Partition, pieces
from engine.config import ModelConfig
from engine.quantization.format import Span, WeightFormat
from engine.quantization.registry import FORMATS, make_format
from kernels.operands import DenseWeight, SplitWeight
from kernels.reference.dequantize import dequantize

K, N = 5 * 256, 48
OPTIONS: dict[str, dict[str, Any]] = {"wint2": {"row_order": "permuted"}}


def random_tensors(weight_format: WeightFormat) -> dict[str, Tensor]:
    if weight_format.name in ("wint8", "wint4", "wint2"):
        return Repository()._matrix(weight_format.name, K, N).tensors()
    generator = torch.Generator().manual_seed(0)
    made = {}
    for suffix, spec in weight_format.tensors(K, N).items():
        if spec.dtypes[0] == "I32":
            made[suffix] = torch.randint(-(2**31), 2**31, spec.shape, generator=generator).to(torch.int32)
        else:
            dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[spec.dtypes[0]]
            made[suffix] = torch.randn(spec.shape, generator=generator).to(dtype)
    return made


def spans(length: int, cuts: list[int]) -> list[Span]:
    return [Span(*ends) for ends in pairwise(sorted({0, length, *cuts}))]


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_parts_joined_again_are_the_whole(name: str, data: st.DataObject) -> None:
    weight_format = make_format(name, OPTIONS.get(name, {}))
    stored = random_tensors(weight_format)
    tile = weight_format.row_tile
    rows = spans(K, [tile * c for c in data.draw(st.lists(st.integers(0, K // tile), max_size=3))])
    columns = spans(N, data.draw(st.lists(st.integers(0, N), max_size=3)))
    whole = weight_format.load(stored, rows=Span(0, K), columns=[Span(0, N)])
    parts = [[weight_format.load(stored, rows=row, columns=[span]) for span in columns] for row in rows]
    joined = join_rows([join_columns(row) for row in parts])
    assert type(joined) is type(whole)
    for ours, theirs in zip(tensors(joined), tensors(whole), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    split = join_rows([join_columns(row) for row in parts], split=True)
    assert isinstance(split, SplitWeight) == (len(rows) > 1)
    assert torch.equal(dequantize(split, torch.bfloat16), dequantize(whole, torch.bfloat16))


@pytest.mark.parametrize("name", FORMATS)
def test_stacked_parts_are_joined_alike(name: str) -> None:
    weight_format = make_format(name, OPTIONS.get(name, {}))
    stored = random_tensors(weight_format)
    whole = weight_format.load(stored, rows=Span(0, K), columns=[Span(0, N)])
    stack = map_tensors(whole, lambda tensor: torch.stack((tensor, tensor.flip(-1))))
    halves = [
        map_tensors(
            weight_format.load(stored, rows=Span(0, K), columns=[span]), lambda tensor: torch.stack((tensor, tensor))
        )
        for span in (Span(0, 16), Span(16, N))
    ]
    joined = join_columns(halves)
    assert torch.equal(dequantize(joined, torch.float32)[1], dequantize(whole, torch.float32))
    assert dequantize(stack, torch.float32).shape == (2, N, K)


def test_different_scales_keep_parts_apart() -> None:
    first = make_format("wint8").load(random_tensors(make_format("wint8")), rows=Span(0, K), columns=[Span(0, N)])
    other = dataclasses.replace(first, scale=first.scale * 2)
    joined = join_rows([first, first, other])
    assert isinstance(joined, SplitWeight)
    assert joined.parts == (first, first, other)
    dense = dequantize(joined, torch.float32)
    assert dense.shape == (N, 3 * K)
    assert torch.equal(dense[:, 2 * K :], 2 * dense[:, :K])


def held_matrix(whole: Tensor, cut: MatrixCut) -> Tensor:
    """What a part holds of a matrix [K, N]."""
    starts = [sum(block.width for block in cut.blocks[:b]) for b in range(len(cut.blocks))]
    columns = [
        torch.arange(start + block.part.start, start + block.part.stop)
        for start, block in zip(starts, cut.blocks, strict=True)
    ]
    return whole[cut.rows.start : cut.rows.stop, torch.cat(columns)]


@settings(deadline=None, max_examples=60)
@given(
    heads=st.sampled_from([(4, 2), (12, 4), (12, 1), (8, 8), (12, 12)]),
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
    size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    data=st.data(),
)
def test_pieces_make_up_what_is_wanted(heads: tuple[int, int], ranks: int, size: int, data: st.DataObject) -> None:
    config = ModelConfig.from_json(
        CONFIG | {"hidden_size": 12, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 2}
    )
    kv = heads[1]
    for count in (ranks, size):
        assume(heads[0] % count == 0 and (kv % count == 0 or count % kv == 0))
    wanted_by = Partition(config, data.draw(st.integers(0, size - 1)), size)
    for cut in (Partition.qkv, lambda part: part.gate_up(24), lambda part: part.rows(24)):
        wanted, held = cut(wanted_by), [cut(Partition(config, rank, ranks)) for rank in range(ranks)]
        whole = torch.arange(wanted.k * sum(block.width for block in wanted.blocks)).view(wanted.k, -1)
        parts = [held_matrix(whole, part) for part in held]
        rows = []
        for row in pieces(wanted, held):
            taken = [
                parts[piece.part][piece.rows.start : piece.rows.stop, span.start : span.stop]
                for piece in row
                for span in piece.columns
            ]
            rows.append(torch.cat(taken, dim=1))
        assert torch.equal(torch.cat(rows), held_matrix(whole, wanted))


def test_a_whole_matrix_is_one_piece() -> None:
    config = Repository().config
    held = [Partition(config, 0, 1).qkv()]
    for size in (1, 2, 4):
        assert [len(row) for row in pieces(Partition(config, size - 1, size).qkv(), held)] == [1]


def test_dense_parts_join_along_both_axes() -> None:
    a, b = DenseWeight(torch.ones(2, 3)), DenseWeight(torch.zeros(2, 3))
    assert join_columns([a, b]).weight.shape == (4, 3)
    assert join_rows([a, b]).weight.shape == (2, 6)
