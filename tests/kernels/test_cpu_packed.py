"""Products straight from packed bytes are those with the decoded weights."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu, ops, reference
from kernels.cpu import memory, storage, threads
from kernels.cpu.dense import HalfPrepared
from kernels.cpu.layout import LINE, TABLE_BYTES
from kernels.cpu.packed import PackedPrepared, codebook, pack
from kernels.cpu.product import decode
from kernels.operands import BitplaneWeight, CcqWeight, DenseWeight, Int4Weight, Int8Weight
from kernels.prepared import DensePrepared
from kernels.reference import dequantize

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
seeds = st.integers(0, 2**32)
quick = settings(deadline=None, max_examples=40)
stacks = st.sampled_from([None, 1, 3])


@pytest.fixture(autouse=True)
def _one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bytes(generator, *shape):
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def ccq(generator, k, n, experts=None, *, row_order="plain", shared=False, line=False):
    """Codebooks of columns; or one for each matrix, of integers if `line`."""
    lead = () if experts is None else (experts,)
    code_scale = 90 + 60 * torch.rand(*lead, n, generator=generator)
    code_zp = 200 * torch.rand(*lead, n, generator=generator) - 100  # words below zero too
    if line:
        code_scale, code_zp = (code_scale * 2).round() / 2, code_zp.round() / 2
    if shared or line:
        code_scale, code_zp = (t[..., :1].expand_as(t).contiguous() for t in (code_scale, code_zp))
    return CcqWeight(
        codes=random_bytes(generator, *lead, k // 4, n),
        group_scales=random_bytes(generator, *lead, -(-k // 128), n),
        super_scales=(0.01 * torch.rand(*lead, n, generator=generator)).bfloat16(),
        code_scale=code_scale,
        code_zp=code_zp,
        row_order=row_order,
    )


def int8(generator, k, n, experts=None):
    lead = () if experts is None else (experts,)
    return Int8Weight(
        random_bytes(generator, *lead, n, k).view(torch.int8), torch.rand(*lead, n, generator=generator) / 128
    )


def int4(generator, k, n, experts=None):
    lead = () if experts is None else (experts,)
    return Int4Weight(random_bytes(generator, *lead, n, k // 2), torch.rand(*lead, n, generator=generator) / 8)


@st.composite
def weights(draw, stack=stacks):
    """Any packed weight: K no multiple of a chunk, an odd number of groups, N no multiple of a tile."""
    generator, experts, n = rng(draw(seeds)), draw(stack), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["plain", "permuted", "int4", "int8"]))  # of rows, or of integers
    if kind == "int8":
        return int8(generator, draw(st.integers(1, 600)), n, experts)
    if kind == "int4":
        return int4(generator, 2 * draw(st.integers(1, 300)), n, experts)
    codebooks = draw(st.sampled_from([{}, {"shared": True}, {"line": True}]))
    return ccq(generator, 64 * draw(st.integers(1, 13)), n, experts, row_order=kind, **codebooks)


def bound(x, dense):
    """What `kernels.cpu.product` says of its error, and fp32's own rounding: [T, N]."""
    k = x.shape[1]
    groups = [slice(first, min(first + 64, k)) for first in range(0, k, 64)]
    steps = sum(x[:, g].abs().amax(1, keepdim=True) / 65024 * dense[:, g].abs().sum(1) for g in groups)
    return steps * 1.01 + 2e-6 * (x.abs() @ dense.abs().T) + 1e-30


@quick
@given(weights())
def test_packed_weights_decode_as_the_reference_to_the_bit(weight):
    expected = dequantize(weight, torch.float32)
    expected = expected if expected.dim() == 3 else expected.unsqueeze(0)
    prepared = pack(weight)
    assert (prepared.out_features, prepared.in_features) == expected.shape[1:]
    for e, matrix in enumerate(expected):
        assert torch.equal(decode(prepared, e, range(prepared.out_features)), matrix)
        part = range(prepared.out_features // 2, prepared.out_features)
        assert torch.equal(decode(prepared, e, part), matrix[part.start :])


@quick
@given(weights(stack=st.none()), st.sampled_from([1, 2, 3, 4, 7, 33]), seeds, st.floats(-12, 4))
def test_linear_errs_no_more_than_it_says(weight, tokens, seed, magnitude):
    dense = dequantize(weight, torch.float32).double()
    x = torch.randn(tokens, dense.shape[1], generator=rng(seed)) * 10**magnitude
    x[:, : x.shape[1] // 3] *= 1e-3  # groups of other sizes, and one token of zeros
    x[tokens // 2] *= tokens > 1
    error = (cpu.linear(x, pack(weight)).double() - x.double() @ dense.T).abs()
    assert bool((error <= bound(x.double(), dense)).all())


@quick
@given(weights(stack=st.none()), st.integers(2, 9), seeds)
def test_a_row_is_the_same_to_the_bit_alone_and_in_a_batch(weight, tokens, seed):
    prepared = pack(weight)
    x = torch.randn(tokens, prepared.in_features, generator=rng(seed))
    together = cpu.linear(x, prepared)
    for t in range(tokens):
        assert torch.equal(cpu.linear(x[t : t + 1], prepared)[0], together[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_takes_any_strides_and_adds_its_bias(dtype):
    weight = ccq(rng(0), 320, 33)
    x = torch.randn(320, 10, generator=rng(1)).to(dtype).T[::2]  # neither rows nor features are neighbours
    bias = torch.randn(33, generator=rng(2)).to(dtype)
    actual = cpu.linear(x, pack(weight), bias)
    expected = x.double() @ dequantize(weight, torch.float32).double().T + bias.double()
    assert actual.dtype == dtype
    tolerance = 2e-3 if dtype == torch.float32 else 2e-1  # values are around 10
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@quick
@given(st.integers(1, 6), st.integers(1, 70), st.sampled_from([1, 2, 3, 4, 5, 16, 17, 40]), st.booleans(), seeds)
def test_products_with_bf16_weights_are_those_with_fp32(panels, n, tokens, strided, seed):
    generator = rng(seed)
    half = HalfPrepared(torch.randn(n, 64 * panels, generator=generator).bfloat16())
    x = torch.randn(64 * panels, tokens, generator=generator).T
    x = x if strided else x.contiguous()
    bias = torch.randn(n, generator=generator)
    expected = x.double() @ half.weight.double().T + bias.double()
    torch.testing.assert_close(cpu.linear(x, half, bias).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_row_only(bad):
    prepared = pack(int8(rng(0), 130, 20))
    x = torch.randn(3, 130, generator=rng(1))
    good = cpu.linear(x, prepared)
    x[1, 7] = bad
    actual = cpu.linear(x, prepared)
    assert not actual[1].isfinite().any()
    assert torch.equal(actual[::2], good[::2])


@quick
@given(
    st.sampled_from(["ccq", "int4", "int8"]),
    st.sampled_from([1, 2, 5, 40]),
    st.integers(1, 9),
    st.sampled_from([(True, True), (True, False), (False, True)]),
    seeds,
    st.data(),
)
def test_fused_moe(kind, tokens, num_experts, packed, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    options = data.draw(st.sampled_from([{}, {"shared": True}, {"line": True}])) if kind == "ccq" else {}
    hidden, width = 64 * data.draw(st.integers(1, 5)), 64 * data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = rng(seed)
    make = {"ccq": ccq, "int4": int4, "int8": int8}[kind]
    operands = [make(generator, k, n, num_experts, **options) for k, n in ((hidden, 2 * width), (width, hidden))]
    exact = [DensePrepared.of(dequantize(operand, torch.float32)) for operand in operands]
    decoded = [DensePrepared.of(dequantize(operand, dtype)) for operand in operands]
    prepared = [pack(o) if is_packed else d for o, d, is_packed in zip(operands, decoded, packed, strict=True)]
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]
    shares = torch.rand(tokens, top_k, generator=generator)
    actual = cpu.fused_moe(x, *prepared, shares, ids)
    expected = reference.fused_moe(x.float(), *exact, shares, ids)
    assert actual.dtype == dtype
    close = 3e-4 if dtype == torch.float32 else 4e-2
    assert (actual.float() - expected).norm() <= close * expected.norm()
    alone = cpu.fused_moe(x[:1], *prepared, shares[:1], ids[:1])
    assert (alone - actual[:1]).float().norm() <= close * expected[:1].norm()


def test_room_taken_in_inference_mode_serves_outside_it():
    with torch.inference_mode():
        memory.bytes_for(memory.SLAB - memory.PAGE)  # of a new slab, which has room for more
    pack(int8(rng(0), 64, 1))


def test_several_threads_compute_the_same():
    weight = pack(ccq(rng(0), 1024, 3000, shared=True))
    assert weight.num_bytes > 3 * threads.LEAST_BYTES
    x = torch.randn(5, 1024, generator=rng(1))
    alone = cpu.linear(x, weight)
    torch.set_num_threads(3)
    for _ in range(20):  # helpers asleep, and awake
        assert torch.equal(cpu.linear(x, weight), alone)


def test_callers_in_several_threads_compute_the_same():
    """One of them has the helpers, the others go without."""
    weight = pack(ccq(rng(0), 1024, 3000, shared=True))
    rows = torch.randn(3, 2, 1024, generator=rng(1))
    alone = [cpu.linear(x, weight) for x in rows]

    def repeat(x):
        torch.set_num_threads(2)  # of this thread
        return [cpu.linear(x, weight) for _ in range(10)]

    with ThreadPoolExecutor(3) as callers:
        for expected, results in zip(alone, callers.map(repeat, rows), strict=True):
            assert all(torch.equal(result, expected) for result in results)


def test_nobody_waits_for_a_helper_that_has_not_begun(monkeypatch):
    monkeypatch.setattr(threads.Helper, "_serve", lambda self: None)
    threads._pool.cache_clear()
    weight = pack(ccq(rng(0), 1024, 3000))
    x = torch.randn(1, 1024, generator=rng(1))
    alone = cpu.linear(x, weight)
    torch.set_num_threads(4)
    assert torch.equal(cpu.linear(x, weight), alone)
    threads._pool.cache_clear()


@quick
@given(st.floats(0, 200, width=32), st.floats(-40000, 40000, width=32))
def test_codebooks_of_columns_are_those_of_the_reference(scale, zero):
    pairs = [torch.tensor([scale, scale + 1]), torch.tensor([zero, zero])]
    weight = CcqWeight(
        codes=torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 2).contiguous(),
        group_scales=torch.full((8, 2), 0x11, dtype=torch.uint8),
        super_scales=torch.ones(2).bfloat16(),
        code_scale=pairs[0],
        code_zp=pairs[1],
        row_order="plain",
    )
    expected = dequantize(weight, torch.float32)  # [2, 1024]: the windows of all bytes
    assert torch.equal(decode(pack(weight), 0, range(2)), expected)
    table = codebook(pairs[0][0], pairs[1][0]).view(4, 256)
    assert torch.equal(table.T.reshape(-1).float() - 32, expected[0])


def test_a_matrix_has_one_codebook_if_all_its_columns_have_the_same():
    shared, own = pack(ccq(rng(0), 64, 5, 2, shared=True)), pack(ccq(rng(0), 64, 5, 2))
    assert shared.table.shape == (2, TABLE_BYTES)
    assert shared.code_scale.numel() == 0
    assert own.table.numel() == 0
    assert own.code_scale.shape == (2, 5)


@pytest.mark.parametrize(
    ("scale", "zero", "expected"),
    [(128.5, 0, True), (100, 12.5, True), (128.5, -99, True), (300, 0, True), (128.25, 0, False), (120, 0.3, False)],
)
def test_codebooks_of_integers_are_computed(scale, zero, expected):
    weight = ccq(rng(0), 64, 3)
    weight = replace(weight, code_scale=torch.full((3,), float(scale)), code_zp=torch.full((3,), float(zero)))
    prepared = pack(weight)
    assert (prepared.kind == LINE) == expected
    assert torch.equal(decode(prepared, 0, range(3)), dequantize(weight, torch.float32))


class TestPrepare:
    """What stays packed."""

    def test_small_weights_are_decoded(self):
        assert isinstance(ops.prepare(int8(rng(0), 128, 128), dtype=torch.float32, device=CPU), DensePrepared)

    @pytest.mark.parametrize("make", [ccq, int4, int8])
    @pytest.mark.parametrize("experts", [None, 4])
    def test_large_ones_stay_packed(self, make, experts):
        n = storage.PACKED_WEIGHTS // 1024 // (experts or 1)
        weight = make(rng(0), 1024, n, experts)
        prepared = ops.prepare(weight, dtype=torch.float32, device=CPU)
        assert isinstance(prepared, PackedPrepared)
        bits = 8 * prepared.num_bytes / (1024 * n * (experts or 1))
        assert bits < {ccq: 2.2, int4: 4.1, int8: 8.1}[make]

    def test_dense_ones_stay_dense(self):
        weight = DenseWeight(torch.randn(2048, 1024, generator=rng(0)))
        for dtype in (torch.bfloat16, torch.float32):
            assert isinstance(ops.prepare(weight, dtype=dtype, device=CPU), DensePrepared)

    def test_what_was_bf16_takes_16_bits(self):
        weight = DenseWeight(torch.randn(2048, 1024, generator=rng(0)).bfloat16().float())
        prepared = ops.prepare(weight, dtype=torch.float32, device=CPU)
        assert isinstance(prepared, HalfPrepared)
        assert prepared.num_bytes == 2 * 2048 * 1024
        assert torch.equal(prepared.weight.float(), weight.weight)

    def test_formats_without_a_kernel_are_decoded_with_a_word_about_it(self, caplog):
        planes = torch.zeros(1024 // 32, 2, 2048, dtype=torch.int32)
        weight = BitplaneWeight(planes, torch.zeros(1024 // 128, 3, 2048, dtype=torch.bfloat16))
        storage._warn.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                prepared = ops.prepare(weight, dtype=torch.float32, device=CPU)
        assert isinstance(prepared, DensePrepared)
        assert [r.getMessage() for r in caplog.records if "BitplaneWeight [2048, 1024]" in r.getMessage()] == [
            caplog.records[0].getMessage()
        ]


def test_another_devices_weights_are_refused():
    with pytest.raises(TypeError, match="another device"):
        reference.linear(torch.zeros(1, 64), pack(ccq(rng(0), 64, 3)))


def test_nothing_is_written_to_what_is_prepared():
    weight = ccq(rng(0), 192, 7)
    before = replace(weight, codes=weight.codes.clone(), group_scales=weight.group_scales.clone())
    pack(weight)
    assert torch.equal(weight.codes, before.codes)
    assert torch.equal(weight.group_scales, before.group_scales)


OTHER_MACHINE = """
import pytest, sys
from kernels.cpu import memory, storage, threads
assert not threads.has_vnni()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", sys.argv[1], *sys.argv[2:]]))
"""


def test_machines_without_vnni_compute_the_same(tmp_path):
    """The same tests with the kernels compiled for a CPU of 2013; 33 rows take the way through decoded weights."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    chosen = "reference_to_the_bit or errs or alone or moe or finite or bf16_weights or rms_norm or paged_attention or "
    chosen += "test_route or silu or rotary_and_store"
    files = [str(Path(__file__).with_name(name)) for name in ("test_cpu_kernels.py", "test_int8_cache_kernels.py")]
    done = subprocess.run(
        [sys.executable, "-c", OTHER_MACHINE, chosen, __file__, *files],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
