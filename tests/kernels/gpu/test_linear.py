"""One matrix: every format against its decoded weights."""

from __future__ import annotations

import logging

import pytest
import torch
import weights as make
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gpu import assembly, launch, shapes, words
from kernels.gpu.linear import linear, prepare
from kernels.gpu.packed import GpuPrepared
from kernels.operands import CcqWeight, Weight
from kernels.prepared import DensePrepared

torch.set_num_threads(1)

FORMATS = {
    "ccq": lambda n: make.ccq(n=n, k=256),
    "ccq of two groups": lambda n: make.ccq(n=n, k=128, pair=make.PAIR),
    "ccq, odd groups, permuted": lambda n: make.ccq(n=n, k=192, order="permuted"),
    "ccq, permuted, words of a pair": lambda n: make.ccq(n=n, k=512, pair=make.PAIR, order="permuted"),
    "ccq, a codebook a column": lambda n: make.ccq(n=n, k=256, pair=None),
    "int8": lambda n: make.int8(n=n, k=192),
    "int8, half a tile": lambda n: make.int8(n=n, k=96),
    "int4": lambda n: make.int4(n=n, k=192),
    "int4, whole tiles": lambda n: make.int4(n=n, k=256),
    "planes of 32": lambda n: make.planes(n=n, k=256, count=3, group=32),
    "planes of 256": lambda n: make.planes(n=n, k=512, count=4, group=256),
    "planes, half a tile": lambda n: make.planes(n=n, k=128, count=2, group=64),
    "planes, half a tile too many": lambda n: make.planes(n=n, k=384, count=2, group=64),
    "grouped, 4 bits": lambda n: make.grouped(n=n, k=128),
    "grouped, 4 bits, two groups a tile": lambda n: make.grouped(n=n, k=96, group=32),
    "grouped, 4 bits, two tiles a group": lambda n: make.grouped(n=n, k=512, group=256),
    "grouped, 2 bits": lambda n: make.grouped(n=n, k=256, bits=2),
    "grouped, 8 bits": lambda n: make.grouped(n=n, k=160, group=32, bits=8),
    "dense": lambda n: make.plain(n=n, k=72),
    "split": lambda n: make.split(n=n, k=256),
}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest deviation, relative to the largest value."""
    return float((got.float() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("tokens", "features", "bias"), [(1, 37, False), (9, 70, True)])
def test_product_is_that_of_the_decoded_weight(name, dtype, tolerance, tokens, features, bias):
    torch.manual_seed(1)
    weight = FORMATS[name](features)
    want = make.dense(weight)
    x = torch.randn(tokens, want.shape[1], dtype=dtype)
    addend = torch.randn(features, dtype=dtype) if bias else None
    got = linear(x, prepare(weight, dtype=dtype, device=make.CPU), addend)
    assert got.dtype == dtype
    assert error(got, x.float() @ want.t() + (0.0 if addend is None else addend.float())) < tolerance


@settings(deadline=None, max_examples=8)
@given(exponents=st.lists(st.integers(-20, 12), min_size=2, max_size=3), seed=st.integers(0, 1000))
def test_rows_of_any_size_keep_their_precision(exponents, seed):
    """Rows are brought into the range of fp16 one by one, whatever the others are."""
    torch.manual_seed(seed)
    weight = make.ccq(n=5, k=128)
    x = torch.randn(len(exponents), 128) * torch.tensor([2.0**e for e in exponents]).unsqueeze(1)
    x = x.bfloat16()
    prepared = prepare(weight, dtype=torch.bfloat16, device=make.CPU)
    assert isinstance(prepared, GpuPrepared)
    part = prepared.parts[0]
    arranged, unit, sums = launch.arrange(x, part, grouped=True)
    assert arranged.dtype == torch.float16
    assert part.order is not None
    shift, feature = part.order >> 16, part.order & 0xFFFF
    whole = arranged.float() * torch.exp2(shift)
    assert torch.equal(whole * unit.unsqueeze(1), x.float()[:, feature])
    groups = x.float().view(len(x), -1, 64).sum(dim=-1)
    torch.testing.assert_close(sums.flatten(1) * unit.unsqueeze(1), groups, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("row", [torch.zeros(64), torch.full((64,), 2.0**-130)])
def test_rows_of_nothing_stay_finite(row):
    got = linear(row.unsqueeze(0).bfloat16(), prepare(make.ccq(n=4, k=64), dtype=torch.bfloat16, device=make.CPU))
    assert got.dtype == torch.bfloat16
    assert bool((got.abs() < 1e-30).all())


def test_long_rows_are_cut_and_summed_in_the_same_order():
    torch.manual_seed(2)
    weight = make.int8(n=3, k=2048)
    prepared = prepare(weight, dtype=torch.float32, device=make.CPU)
    assert isinstance(prepared, GpuPrepared)
    shape = shapes.shape_for(2, prepared)
    assert shapes.splits_for(prepared.parts[0], blocks=1, shape=shape) > 1
    x, bias = torch.randn(2, 2048), torch.randn(3)
    first = linear(x, prepared, bias)
    assert error(first, x @ make.dense(weight).t() + bias) < 2e-6
    assert torch.equal(first, linear(x, prepared, bias))


@pytest.mark.parametrize(("tiles", "blocks"), [(1, 1), (5, 1), (31, 3), (32, 2000), (128, 8)])
def test_every_tile_belongs_to_one_split(tiles, blocks):
    prepared = prepare(make.int8(n=2, k=tiles * 64), dtype=torch.float32, device=make.CPU)
    assert isinstance(prepared, GpuPrepared)
    splits = shapes.splits_for(prepared.parts[0], blocks=blocks, shape=shapes.SHAPES[0])
    each = -(-tiles // splits)
    assert (splits - 1) * each < tiles <= splits * each


def _operand_bytes(weight: Weight) -> int:
    tensors = [getattr(weight, name) for name in weight.__slots__]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    "weight",
    [
        make.ccq(2, n=8, k=7168),
        make.ccq(2, n=8, k=64 * 99),
        make.ccq(2, n=8, k=2048, pair=make.PAIR),
        make.int8(2, n=8, k=1024),
        make.int4(2, n=8, k=1024),
        make.planes(2, n=8, k=2048, group=256),
        make.grouped(2, n=8, k=2048),
    ],
)
def test_packed_weights_take_the_memory_of_their_operand(weight):
    prepared = prepare(weight, dtype=torch.bfloat16, device=make.CPU)
    assert isinstance(prepared, GpuPrepared)
    order = prepared.parts[0].order
    shared = 0 if order is None else order.numel() * 4  # one for all columns
    assert prepared.num_bytes - shared <= 1.02 * _operand_bytes(weight)
    assert (prepared.out_features, prepared.in_features) == make.dense(weight).shape[1:]


def test_what_has_no_kernel_is_decoded_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        prepared = prepare(make.grouped(n=4, k=96, group=96), dtype=torch.float32, device=make.CPU)
    assert isinstance(prepared, DensePrepared)
    assert "GroupedWeight with 96 input features" in caplog.text


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(-200, 200, width=32), zero=st.floats(-4000, 4000, width=32))
def test_lines_of_integers_give_the_same_words(scale, zero):
    one, two = torch.tensor([scale]), torch.tensor([zero])
    want = words.words(one, two)[:, 0]
    for shift in (words.WIDE_SHIFT, words.PAIR_SHIFT):
        found = words.lines(one, two, shift=shift)
        if found.there:
            line = torch.arange(256) * found.multiplier.long() + found.addend.long()
            assert torch.equal(line >> shift & 0x7FFF, want & 0x7FFF)
            assert shift == words.WIDE_SHIFT or (int(line.min()) >= 0 and int(line.max()) < 2**16)


def columns_of(weight: CcqWeight, first: int, last: int) -> CcqWeight:
    tensors = (weight.codes, weight.group_scales, weight.super_scales, weight.code_scale, weight.code_zp)
    return CcqWeight(*(t[..., first:last] for t in tensors), row_order="plain")


@pytest.fixture(scope="module")
def lineless() -> tuple[CcqWeight, int]:
    """A column that no line of integers gives the words of, and where it is; one in several hundred has none."""
    torch.manual_seed(3)
    weight = make.ccq(n=4000, k=128, pair=None)
    there = words.lines(weight.code_scale, weight.code_zp, shift=words.WIDE_SHIFT).there
    return weight, int((~there).nonzero()[0])


@pytest.mark.parametrize(
    ("before", "columns", "kind"),
    [(0, 4, assembly.CCQ_EXACT), (130, 300, assembly.CCQ_MIXED)],
)
@pytest.mark.parametrize("tokens", [2, 9])
def test_a_column_without_a_line_keeps_the_exact_words(lineless, before, columns, kind, tokens):
    """And only its block of columns pays for that."""
    whole, bad = lineless
    weight = columns_of(whole, bad - before, bad - before + columns)
    prepared = prepare(weight, dtype=torch.float32, device=make.CPU)
    assert isinstance(prepared, GpuPrepared)
    part = prepared.parts[0]
    assert part.words == kind.value
    assert part.exact is None or part.exact[0, before // 128] == 1
    x = torch.randn(tokens, 128)
    assert error(linear(x, prepared), x @ make.dense(weight).t()) < 2e-6


def test_words_that_no_kernel_makes_are_decoded_once():
    weight = make.ccq(n=3, k=64, pair=(1e6, 0.0))
    assert isinstance(prepare(weight, dtype=torch.float32, device=make.CPU), DensePrepared)


def test_pipelines_are_as_deep_as_shared_memory_allows():
    """`test_compile` has the compiler's word for an A100 and Hopper; GeForce and L cards have 99 KiB."""

    def depths(layout, *, words=0, planes=0, groups=1, elements=32, fields):
        return [
            shapes.stages_for(
                layout, shapes.SHAPES[-1], words=words, planes=planes, groups=groups, elements=elements, fields=fields,
                shared_bytes=kibibytes * 1024,
            )
            for kibibytes in (163, 99)
        ]  # fmt: skip

    assert depths("int8", elements=64, fields=1) == [3, 3]
    assert depths("ccq", words=assembly.CCQ_WIDE.value, groups=4, fields=8) == [3, 3]
    assert depths("ccq", words=assembly.CCQ_MIXED.value, groups=4, fields=8) == [2, 2]
    assert depths("planes", planes=2, groups=2, fields=16) == [3, 2]
    assert depths("planes", planes=4, groups=2, fields=16) == [2, 2]
