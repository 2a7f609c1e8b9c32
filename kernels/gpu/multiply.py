"""The product with packed weights: one kernel for decode and prefill, for one matrix and for experts.

`kernels.gpu.grouped` has another for few rows and weights whose scales change along the input features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu import assembly, decode
from kernels.gpu.packed import FIELDS, Layout
from kernels.gpu.shapes import SHAPES, Shape, features_for, stages_for
from kernels.gpu.variant import Variant

_CCQ_EXPONENT = tl.constexpr(assembly.POSITION - assembly.CCQ_LOW - assembly.CCQ_SCALE)
_CCQ_UNIT = tl.constexpr(2.0**assembly.CCQ_SCALE)


# Sizes that change from step to step must not make new kernels, nor those of a weight that say nothing of an address:
# with N, Q and GROUPS a compiler knows all of the alignment that it can use.
@triton.jit(do_not_specialize=["T", "tiles", "split_tiles", "group_rows", "first_split"])
def multiply_kernel(
    x_ptr,
    unit_ptr,
    codes_ptr,
    column_ptr,
    group_ptr,
    multiplier_ptr,
    addend_ptr,
    exact_ptr,
    slot_ptr,
    expert_ptr,
    bias_ptr,
    out_ptr,
    T,
    N,
    K,
    tiles,
    split_tiles,
    group_rows,
    x_stride,
    column_stride,
    first_split,
    LAYOUT: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    Q: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARE: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
):
    """``out[slot] = x[slot // SHARE] W[expert]^T`` over some of the tiles of K, in fp32.

    Weights are the first operand, [BN, Q] by [Q, BT]: output features fill the tall side of a tensor core's
    instruction, so one to eight tokens waste nothing but its width. The multiply-adds then cost next to no issue slots,
    which batch 1 needs for decoding. A program reads each of its bytes once, BN Q of them in one run, through the
    software pipeline. Sums of different splits of K are added by the next kernel in a fixed order: no atomics, the same
    bits every time.

    Args:
        x_ptr: [rows, x_stride]; arranged (`kernels.gpu.arrange`) unless dense.
        unit_ptr: fp32 [rows]; not read for dense.
        codes_ptr: `Packed.codes`.
        column_ptr: `Packed.column_scale`; not read for dense.
        group_ptr: `Packed.group_scales`, CCQ and bit planes only.
        multiplier_ptr: `Packed.multiplier`, CCQ only.
        addend_ptr: `Packed.addend`, CCQ only.
        exact_ptr: `Packed.exact`, for CCQ_MIXED only.
        slot_ptr: int32 [blocks, BT], rows of `out` in a block, T or more where there is none; with EXPERTS.
        expert_ptr: int32 [blocks], -1 for an empty block; with EXPERTS.
        bias_ptr: [N], with BIAS.
        out_ptr: [splits, T, N], fp32, or the compute dtype if nothing remains to be summed.
        T: rows of `out`.
        N: output features.
        K: input features.
        tiles: along K.
        split_tiles: tiles of a program.
        group_rows: groups of a column in `group_ptr`, bit planes only.
        x_stride: of rows of x.
        column_stride: 1, or 0 for one codebook.
        first_split: of this part of a split weight.
        LAYOUT: `Packed.layout`.
        WORDS: of CCQ, see `decode`.
        PLANES: bit planes.
        GROUP_TILES: of bit planes: tiles of a group, if it has more than one.
        GROUPS: of a tile.
        Q: elements of a tile's column.
        BN: output features of a program.
        BT: rows of x of a program.
        EXPERTS: blocks of tokens sorted by expert; otherwise block b is the rows from ``b BT``.
        SHARE: slots that share a row of x.
        BIAS: whether to add one.
        ASM: see `kernels.gpu.decode`.
    """
    block = tl.program_id(0)
    start = tl.program_id(1) * BN
    n = start + tl.arange(0, BN)
    split = tl.program_id(2)
    t = tl.arange(0, BT)
    q = tl.arange(0, Q)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    expert = tl.full((), 0, dtype=tl.int64)
    slot = block * BT + t
    if EXPERTS:
        expert = tl.load(expert_ptr + block).to(tl.int64)
        if expert < 0:
            return
        slot = tl.load(slot_ptr + slot)
    present = slot < T
    inside = n < N
    column = tl.minimum(n, N - 1)
    row = tl.where(present, slot // SHARE, 0).to(tl.int64)
    x_rows = x_ptr + row[None, :] * x_stride + q[:, None]  # [Q, BT]
    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tiles)
    at = expert * tiles + first
    # One run of memory: no address depends on where the columns end.
    run = tl.arange(0, BN)[:, None] * Q + q[None, :]

    acc = tl.zeros((BN, BT), dtype=tl.float32)
    factor: tl.constexpr = 2.0**_CCQ_EXPONENT if LAYOUT == "ccq" else 1.0
    if LAYOUT == "dense":
        for tile in range(first, last):
            k = tile * Q + q
            codes = tl.load(codes_ptr + (expert * N + column[:, None]) * K + k[None, :], mask=k[None, :] < K, other=0.0)
            x = tl.load(x_rows + tile * Q, mask=present[None, :] & (k[:, None] < K), other=0.0)
            acc = tl.dot(codes, x, acc, input_precision="ieee")
    elif LAYOUT == "int8":
        codes_at = codes_ptr + (at * N + start) * Q + run
        for tile in range(first, last):
            x = tl.load(x_rows + tile * Q, mask=present[None, :], other=0.0)
            acc = tl.dot(decode.int8(tl.load(codes_at), dtype, ASM), x, acc, input_precision="ieee")
            codes_at += N * Q
    elif LAYOUT == "int4":
        codes_at = codes_ptr + (at * N + start) * Q + run
        for tile in range(first, last):
            low, high = decode.int4(tl.load(codes_at), dtype, ASM)
            x0 = tl.load(x_rows + tile * (2 * Q), mask=present[None, :], other=0.0)
            x1 = tl.load(x_rows + (tile * (2 * Q) + Q), mask=present[None, :], other=0.0)
            acc = tl.dot(low, x0, acc, input_precision="ieee")
            acc = tl.dot(high, x1, acc, input_precision="ieee")
            codes_at += N * Q
    elif LAYOUT == "ccq":
        codes_at = codes_ptr + (at * N + start) * Q + run
        scales_at = group_ptr + at * N + start + tl.broadcast_to(tl.arange(0, BN)[:, None], (BN, GROUPS))
        multiplier = tl.load(multiplier_ptr + (expert * N + column) * column_stride)
        addend = tl.load(addend_ptr + (expert * N + column) * column_stride)
        x_at = x_rows + first * (8 * Q)
        if WORDS == assembly.CCQ_MIXED:
            if tl.load(exact_ptr + expert * ((N + 127) // 128) + start // 128) != 0:
                acc = _ccq(
                    codes_at, scales_at, x_at, present, multiplier, addend, first, last, N,
                    assembly.CCQ_EXACT, GROUPS, Q, BN, BT, dtype, ASM,
                )  # fmt: skip
            else:
                acc = _ccq(
                    codes_at, scales_at, x_at, present, multiplier, addend, first, last, N,
                    assembly.CCQ_WIDE, GROUPS, Q, BN, BT, dtype, ASM,
                )  # fmt: skip
        else:
            acc = _ccq(
                codes_at, scales_at, x_at, present, multiplier, addend, first, last, N,
                WORDS, GROUPS, Q, BN, BT, dtype, ASM,
            )  # fmt: skip
    else:
        codes_at = codes_ptr + (at * PLANES * N + start) * Q + run
        x_at = x_rows + first * (16 * Q)
        base = group_ptr + expert * group_rows * (PLANES + 1) * N + column[:, None]
        for tile in range(first, last):
            factors_at = base + (tile // GROUP_TILES * GROUPS + tl.arange(0, GROUPS))[None, :] * ((PLANES + 1) * N)
            elements = ()
            factors = ()
            for i in tl.static_range(PLANES + 1):
                scale = tl.load(factors_at + i * N).to(dtype)
                factors += (tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, GROUPS, Q // GROUPS)), (BN, Q)),)
            for i in tl.static_range(PLANES):
                elements += (tl.load(codes_at + i * N * Q),)
            fields = decode.planes(elements, factors, PLANES, dtype, ASM)
            for field in tl.static_range(16):
                x = tl.load(x_at + field * Q, mask=present[None, :], other=0.0)
                acc = tl.dot(fields[field], x, acc, input_precision="ieee")
            codes_at += PLANES * N * Q
            x_at += 16 * Q

    if LAYOUT != "dense":
        acc *= (tl.load(column_ptr + expert * N + column).to(tl.float32) * factor)[:, None]
        acc *= tl.load(unit_ptr + row)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + column).to(tl.float32)[:, None]
    out = out_ptr + ((first_split + split).to(tl.int64) * T + slot[None, :]) * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=present[None, :] & inside[:, None])


@triton.jit
def _ccq(
    codes_at, scales_at, x_at, present, multiplier, addend, first, last, N,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    dtype: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """[BN, BT] in units of ``2^(CCQ_LOW - POSITION - CCQ_SCALE)``."""
    multiplier = tl.broadcast_to(multiplier[:, None], (BN, Q))
    addend = tl.broadcast_to(addend[:, None], (BN, Q))
    places = (tl.arange(0, GROUPS) * 4)[None, :]
    acc = tl.zeros((BN, BT), dtype=tl.float32)
    for _ in range(first, last):
        scale = tl.load(scales_at).to(tl.int32) >> places & 15  # [BN, GROUPS]
        scale = (scale.to(tl.float32) * _CCQ_UNIT).to(dtype)
        scale = tl.reshape(tl.broadcast_to(scale[:, None, :, None], (BN, 4, GROUPS, 2)), (BN, Q))
        windows = decode.ccq_scaled(tl.load(codes_at), multiplier, addend, scale, WORDS, dtype, ASM)
        for field in tl.static_range(8):
            x = tl.load(x_at + field * Q, mask=present[None, :], other=0.0)
            acc = tl.dot(windows[field], x, acc, input_precision="ieee")
        codes_at += N * Q
        scales_at += N
        x_at += 8 * Q
    return acc


_SIGNATURE = {
    "x_ptr": "*fp16",
    "unit_ptr": "*fp32",
    "codes_ptr": "*i16",
    "column_ptr": "*bf16",
    "group_ptr": "*i16",
    "multiplier_ptr": "*i32",
    "addend_ptr": "*i32",
    "exact_ptr": "*u8",
    "slot_ptr": "*i32",
    "expert_ptr": "*i32",
    "bias_ptr": "*bf16",
    "out_ptr": "*fp32",
    "T": "i32",
    "N": "i32",
    "K": "i32",
    "tiles": "i32",
    "split_tiles": "i32",
    "group_rows": "i32",
    "x_stride": "i32",
    "column_stride": "i32",
    "first_split": "i32",
}
_ALIGNED = (*(name for name in _SIGNATURE if name.endswith("_ptr")), "N", "K", "x_stride")
_TYPES: dict[Layout, dict[str, str]] = {
    "dense": {"x_ptr": "*bf16", "unit_ptr": "*bf16", "codes_ptr": "*bf16", "group_ptr": "*bf16"},
    "int8": {"codes_ptr": "*u8"},
    "int4": {"codes_ptr": "*u8"},
    "planes": {"group_ptr": "*fp16", "column_ptr": "*fp32"},
    "ccq": {},
}


def variants() -> list[Variant]:
    """Every layout, for eight tokens and for many, as ERNIE-4.5's experts and matrices call it."""
    layouts: list[tuple[str, Layout, int, int]] = [
        ("ccq_pair", "ccq", assembly.CCQ_PAIR.value, 0),
        ("ccq_wide", "ccq", assembly.CCQ_WIDE.value, 0),
        ("ccq_exact", "ccq", assembly.CCQ_EXACT.value, 0),
        ("ccq_mixed", "ccq", assembly.CCQ_MIXED.value, 0),
        ("int8", "int8", 0, 0),
        ("int4", "int4", 0, 0),
        ("planes2", "planes", 0, 2),
        ("planes4", "planes", 0, 4),
        ("dense", "dense", 0, 0),
    ]
    calls = [
        (layout, shape, True)
        for layout in layouts
        for shape in (SHAPES[0], SHAPES[-1])
        if layout[1] != "planes" or shape is SHAPES[-1]  # `kernels.gpu.grouped` takes them otherwise
    ]
    calls += [(layout, SHAPES[1], False) for layout in layouts if layout[0] in ("ccq_wide", "int8", "int4")]
    return [_variant(*layout, shape=shape, experts=experts) for layout, shape, experts in calls]


def _variant(name: str, layout: Layout, words: int, planes: int, *, shape: Shape, experts: bool) -> Variant:
    features = features_for(layout, shape)
    elements = 32 if layout in ("ccq", "planes") else 64
    constants = {"LAYOUT": layout, "WORDS": words, "PLANES": planes, "GROUP_TILES": 1, "Q": elements}
    groups = {"ccq": 4, "planes": 2}.get(layout, 1)
    constants |= {"GROUPS": groups}
    constants |= {"BN": features, "BT": shape.rows, "EXPERTS": experts, "SHARE": 8 if experts else 1}
    constants |= {"BIAS": False, "ASM": layout != "dense"}
    stages = stages_for(
        layout, shape, words=words, planes=planes, groups=groups, elements=elements, fields=FIELDS[layout]
    )  # fmt: skip
    packed_bits = {"dense": 16, "int8": 8, "int4": 4, "ccq": 2, "planes": max(planes, 1)}[layout]
    return Variant(
        f"multiply_{name}_{'experts' if experts else 'linear'}_{shape.rows}",
        multiply_kernel,
        _SIGNATURE | _TYPES[layout],
        constants,
        num_warps=shape.warps,
        num_stages=stages,
        aligned=_ALIGNED,
        packed_bytes=features * elements * FIELDS[layout] * packed_bits // 8,
    )
