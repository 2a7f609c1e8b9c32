"""A cut of a packed matrix equals the same cut of the dequantized one, for every format and any rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import ConfigError, UnsupportedError
from engine.quantization.bitplane import Bitplane, pack_planes
from engine.quantization.format import Span, TensorSpec, WeightFormat
from engine.quantization.gptq import pack_words
from engine.quantization.registry import FORMATS, format_options, make_format
from engine.quantization.wint2 import pack_scales, unpack_scales
from kernels.operands import BitplaneWeight, CcqWeight
from kernels.reference.dequantize import dequantize, unpack_words

DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
COLUMN_UNIT = 16  # what the pickiest format (gptq of 2 bits) needs of N


def random_tensor(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    if spec.dtypes[0] == "I32":
        return torch.randint(-(2**31), 2**31, spec.shape, generator=generator).to(torch.int32)
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


def some_format(name: str) -> WeightFormat:
    return make_format(name, {"row_order": "permuted"} if name == "wint2" else {})


@st.composite
def formats(draw: st.DrawFn) -> WeightFormat:
    """Any format with any options (and choices at run time) that fit K in multiples of 64."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    group_size = draw(st.sampled_from([32, 64]))
    match name:
        case "wint2":
            return make_format(name, {"row_order": draw(st.sampled_from(["plain", "permuted"]))})
        case "gptq":
            return make_format(name, {"bits": draw(st.sampled_from([2, 4, 8])), "group_size": group_size})
        case "bitplane":
            if draw(st.booleans()):
                read = draw(st.sampled_from([None, 2, 3, 4]))
                return Bitplane(planes=4, group_size=group_size, nested=True, read_planes=read)
            return make_format(name, {"planes": draw(st.sampled_from([2, 3, 4])), "group_size": group_size})
    return make_format(name)


def cuts(length: int, unit: int) -> st.SearchStrategy[list[int]]:
    """Sorted cut points of 0..length at multiples of ``unit``, both ends included."""
    inner = st.sets(st.integers(0, length // unit), max_size=4)
    return inner.map(lambda points: sorted({0, length, *(unit * point for point in points)}))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[WeightFormat, int, int, list[int], list[int]]:
    weight_format = draw(formats())
    k, n = 64 * draw(st.integers(1, 6)), COLUMN_UNIT * draw(st.integers(1, 4))
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
    k, half = 128, 40
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
        tensors = random_matrix(weight_format, 128, COLUMN_UNIT, seed=1)
        part = weight_format.load(tensors, rows=Span(0, 128), columns=[Span(0, COLUMN_UNIT)])
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


def test_a_nested_weight_is_loaded_with_the_planes_that_are_read() -> None:
    weight_format = Bitplane(planes=4, group_size=64, nested=True)
    tensors = random_matrix(weight_format, 128, 8, seed=0)
    for count in (2, 3, 4):
        alone = {"planes": tensors["planes"][:, :count], "coefficients": tensors[f"coefficients_{count}"]}
        part = replace(weight_format, read_planes=count).load(tensors, rows=Span(64, 128), columns=[Span(1, 6)])
        assert isinstance(part, BitplaneWeight)
        assert part.planes.shape == (2, count, 5)
        assert part.coefficients.shape == (1, count + 1, 5)
        expected = Bitplane(planes=count, group_size=64).dequantize(alone)
        assert torch.equal(replace(weight_format, read_planes=count).dequantize(tensors), expected)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(2, 4), words=st.integers(1, 4), n=st.integers(1, 5), seed=st.integers(0, 99))
def test_bit_t_of_word_j_is_row_32j_plus_t(count: int, words: int, n: int, seed: int) -> None:
    bits = torch.randint(0, 2, (32 * words, count, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_planes(bits)
    for j in range(words):
        for t in range(32):
            assert torch.equal((packed[j] >> t) & 1, bits[32 * j + t])


@settings(deadline=None, max_examples=30)
@given(bits=st.sampled_from([2, 4, 8]), words=st.integers(1, 4), n=st.integers(1, 5), seed=st.integers(0, 99))
def test_words_of_integers_pack_and_unpack(bits: int, words: int, n: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (words * 32 // bits, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_words(values, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (words, n))
    assert torch.equal(unpack_words(packed, bits).long(), values)
    assert torch.equal(packed & (2**bits - 1), values[:: 32 // bits].int()), "the first row is in the lowest bits"


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("bitplane", {"planes": 5}, UnsupportedError, "planes 5 is not supported; supported: 2, 3, 4"),
        ("bitplane", {"planes": 2, "nested": True}, UnsupportedError, "nested weights store 4 planes; found planes 2"),
        ("bitplane", {"nested": 1}, ConfigError, "nested is 1; expected true or false"),
        ("bitplane", {"group_size": 48}, UnsupportedError, "group_size 48.*multiples of 32 from 32 to 256"),
        ("bitplane", {"read_planes": 2}, ConfigError, "no option 'read_planes'; it has: planes, group_size, nested"),
        ("gptq", {"bits": 3}, UnsupportedError, "bits 3 is not supported; supported: 2, 4, 8"),
        ("gptq", {"bits": "2"}, ConfigError, "bits is '2'; expected an integer"),
        ("gptq", {"group_size": 512}, UnsupportedError, "group_size 512.*multiples of 32 from 32 to 256"),
        ("gptq", {"group_size": True}, ConfigError, "group_size is True; expected an integer"),
    ],
)
def test_an_option_the_format_does_not_have_is_refused(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_format(name, options)


def test_planes_that_are_not_stored_cannot_be_read() -> None:
    with pytest.raises(UnsupportedError, match="3 planes can't be read of weights that store 2; possible: 2"):
        Bitplane(planes=2, read_planes=3)


@settings(deadline=None, max_examples=50)
@given(weight_format=formats())
def test_options_make_the_format_again_but_for_the_readers_choices(weight_format: WeightFormat) -> None:
    again = make_format(weight_format.name, format_options(weight_format))
    assert again == (replace(weight_format, read_planes=None) if isinstance(weight_format, Bitplane) else weight_format)


def test_a_matrix_that_groups_do_not_divide_is_told_what_does() -> None:
    message = (
        r"{} with group_size 64 needs K in multiples of 64; found K=352, N=16. K=352 fits: bf16; .* group_size 32$"
    )
    for name in ("bitplane", "gptq"):
        with pytest.raises(UnsupportedError, match=message.format(name)):
            make_format(name, {"group_size": 64}).tensors(352, 16)
        with pytest.raises(UnsupportedError, match=r"K=100 fits: bf16$"):
            make_format(name, {"group_size": 64}).tensors(100, 16)
    with pytest.raises(UnsupportedError, match="gptq of 4 bits needs N in multiples of 8; found N=12"):
        make_format("gptq", {"bits": 4}).tensors(128, 12)


def test_wint2_of_unknown_row_order_is_not_guessed() -> None:
    weight_format = make_format("wint2")
    with pytest.raises(ConfigError, match="row_order"):
        weight_format.dequantize(random_matrix(weight_format, 64, 4, seed=0))


@pytest.mark.parametrize(("name", "k", "n"), [("wint8", 96, 4), ("wint8", 64, 3), ("wint4", 64, 6), ("wint2", 32, 4)])
def test_a_shape_the_format_cannot_hold_is_refused(name: str, k: int, n: int) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} needs K in multiples of 64.*K={k}"):
        make_format(name).tensors(k, n)


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'fp8'.*supported: bf16, wint8, wint4, wint2, bitplane, gptq"):
        make_format("fp8")
