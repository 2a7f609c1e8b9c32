"""A cut of a packed matrix equals the same cut of the dequantized one, for every format and any rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import ConfigError, UnsupportedError
from engine.quantization.format import Span, TensorSpec, WeightFormat
from engine.quantization.registry import FORMATS, make_format
from engine.quantization.wint2 import pack_scales, unpack_scales
from kernels.operands import CcqWeight
from kernels.reference.dequantize import dequantize

DTYPES = {"U8": torch.uint8, "I8": torch.int8, "BF16": torch.bfloat16, "F32": torch.float32}


def random_tensor(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    if spec.dtypes[0] in ("U8", "I8"):
        return torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=generator).view(DTYPES[spec.dtypes[0]])
    return torch.randn(spec.shape, generator=generator).to(DTYPES[spec.dtypes[0]])


def random_matrix(weight_format: WeightFormat, k: int, n: int, *, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {suffix: random_tensor(spec, generator) for suffix, spec in weight_format.tensors(k, n).items()}
    if "code_scale" in tensors:
        tensors["code_scale"] = tensors["code_scale"].abs() * 60 + 20
        tensors["code_zp"] = tensors["code_zp"] * 300
    return tensors


def dense(weight_format: WeightFormat, tensors: dict[str, Tensor], rows: Span, columns: Sequence[Span]) -> Tensor:
    """[K, N] of a part."""
    return dequantize(weight_format.load(tensors, rows=rows, columns=columns), torch.bfloat16).T


def some_format(name: str, row_order: str = "permuted") -> WeightFormat:
    return make_format(name, {"row_order": row_order} if name == "wint2" else {})


def cuts(length: int, unit: int) -> st.SearchStrategy[list[int]]:
    """Sorted cut points of 0..length at multiples of ``unit``, both ends included."""
    inner = st.sets(st.integers(0, length // unit), max_size=4)
    return inner.map(lambda points: sorted({0, length, *(unit * point for point in points)}))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[WeightFormat, int, int, list[int], list[int]]:
    row_order = draw(st.sampled_from(["plain", "permuted"]))
    weight_format = some_format(draw(st.sampled_from(sorted(FORMATS))), row_order)
    k, n = 64 * draw(st.integers(1, 6)), 4 * draw(st.integers(1, 6))
    return weight_format, k, n, draw(cuts(k, weight_format.row_tile)), draw(cuts(n, 1))


@settings(deadline=None, max_examples=150)
@given(case=matrices(), seed=st.integers(0, 99))
def test_pieces_are_cuts_of_the_dequantized_matrix_and_join_to_the_whole(
    case: tuple[WeightFormat, int, int, list[int], list[int]], seed: int
) -> None:
    weight_format, k, n, row_cuts, column_cuts = case
    tensors = random_matrix(weight_format, k, n, seed=seed)
    whole = weight_format.dequantize(tensors)
    assert whole.shape == (k, n)
    rows = [Span(*pair) for pair in pairwise(row_cuts)]
    columns = [Span(*pair) for pair in pairwise(column_cuts)]
    pieces = [[dense(weight_format, tensors, row, [column]) for column in columns] for row in rows]
    for row, line in zip(rows, pieces, strict=True):
        for column, piece in zip(columns, line, strict=True):
            assert torch.equal(piece, whole[row.start : row.stop, column.start : column.stop])
    assert torch.equal(torch.cat([torch.cat(line, dim=1) for line in pieces]), whole)


@settings(deadline=None, max_examples=50)
@given(name=st.sampled_from(sorted(FORMATS)), world=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_halves_of_a_fused_matrix_are_cut_apart(name: str, world: int, seed: int) -> None:
    weight_format = some_format(name)
    k, half = 128, 24
    tensors = random_matrix(weight_format, k, 2 * half, seed=seed)
    whole = weight_format.dequantize(tensors)
    share = half // world
    for rank in range(world):
        gate = Span(rank * share, (rank + 1) * share)
        up = Span(half + gate.start, half + gate.stop)
        piece = dense(weight_format, tensors, Span(0, k), [gate, up])
        expected = torch.cat((whole[:, gate.start : gate.stop], whole[:, up.start : up.stop]), dim=1)
        assert torch.equal(piece, expected)


@settings(deadline=None, max_examples=30)
@given(groups=st.integers(1, 9), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_scale_pairs_pack_and_unpack(groups: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(0, 16, (groups, columns), dtype=torch.uint8, generator=generator)
    packed = pack_scales(scales)
    assert packed.shape == ((groups + 1) // 2, columns)
    assert torch.equal(unpack_scales(packed, groups), scales)
    assert torch.equal(packed[0] >> 4, scales[0]), "the even group is in the high nibble"


def test_parts_do_not_share_memory_with_the_file() -> None:
    for name in FORMATS:
        weight_format = some_format(name)
        tensors = random_matrix(weight_format, 128, 8, seed=1)
        part = weight_format.load(tensors, rows=Span(0, 128), columns=[Span(0, 8)])
        before = dequantize(part, torch.float32).clone()
        for tensor in tensors.values():
            tensor.zero_()
        assert torch.equal(dequantize(part, torch.float32), before), name


def test_wint2_keeps_its_bytes_packed() -> None:
    weight_format = some_format("wint2")
    part = weight_format.load(random_matrix(weight_format, 256, 8, seed=0), rows=Span(64, 256), columns=[Span(2, 7)])
    assert isinstance(part, CcqWeight)
    assert part.codes.shape == (48, 5)
    assert part.group_scales.shape == (2, 5)
    assert part.row_order == "permuted"


def test_wint2_of_unknown_row_order_is_not_guessed() -> None:
    weight_format = make_format("wint2")
    with pytest.raises(ConfigError, match="row_order"):
        weight_format.dequantize(random_matrix(weight_format, 64, 4, seed=0))


@pytest.mark.parametrize(("name", "k", "n"), [("wint8", 96, 4), ("wint8", 64, 3), ("wint4", 64, 6), ("wint2", 32, 4)])
def test_a_shape_the_format_cannot_hold_is_refused(name: str, k: int, n: int) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} needs K in multiples of 64.*K={k}"):
        make_format(name).tensors(k, n)


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'fp8'.*supported: bf16, wint8, wint4, wint2"):
        make_format("fp8")
