"""The product with weights whose scales change along their input features, for few rows of activations.

A sum over one group of input features needs that group's scale only once, not for each of its weights. So every group
of a tile gets columns of its own in the tensor core's second operand: column ``row groups + g`` holds the activations
of that row in the features of group g, and zeros elsewhere. An instruction has eight columns whether they are used or
not; two rows and four groups fill them. What is left to do for a weight is to mask it out of its register
(`kernels.gpu.decode`, raw fields).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu import assembly, groups
from kernels.gpu.packed import Layout
from kernels.gpu.shapes import COLUMNS, FEW, SHAPES, Shape, features_for, stages_for
from kernels.gpu.variant import Variant

_POSITION = tl.constexpr(assembly.POSITION)
_CCQ_LOW = tl.constexpr(assembly.CCQ_LOW)


# Sizes that change from step to step must not make new kernels, nor those of a weight that say nothing of an address:
# with N, Q and GROUPS a compiler knows all of the alignment that it can use.
@triton.jit(do_not_specialize=["T", "tiles", "split_tiles", "group_rows", "first_split"])
def grouped_kernel(
    x_ptr,
    unit_ptr,
    sums_ptr,
    codes_ptr,
    column_ptr,
    group_ptr,
    zeros_ptr,
    multiplier_ptr,
    addend_ptr,
    exact_ptr,
    slot_ptr,
    expert_ptr,
    bias_ptr,
    out_ptr,
    T,
    N,
    tiles,
    split_tiles,
    group_rows,
    column_stride,
    first_split,
    LAYOUT: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    RUN: tl.constexpr,
    Q: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARE: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``out[slot] = x[slot // SHARE] W[expert]^T`` over some of the tiles of K, in fp32.

    As `kernels.gpu.multiply.multiply_kernel`, which has the reasons for what is not said here.

    Args:
        x_ptr: [rows, tiles, F, Q], arranged with shifts (`kernels.gpu.arrange`).
        unit_ptr: fp32 [rows].
        sums_ptr: fp32 [rows, tiles, GROUPS].
        codes_ptr: `Packed.codes`.
        column_ptr: `Packed.column_scale`.
        group_ptr: `Packed.group_scales`.
        zeros_ptr: `Packed.zeros`, grouped integers only.
        multiplier_ptr: `Packed.multiplier`, CCQ only.
        addend_ptr: `Packed.addend`, CCQ only.
        exact_ptr: `Packed.exact`, for CCQ_MIXED only.
        slot_ptr: int32 [blocks, ROWS], rows of `out` in a block, T or more where there is none; with EXPERTS.
        expert_ptr: int32 [blocks], -1 for an empty block; with EXPERTS.
        bias_ptr: [N], with BIAS.
        out_ptr: [splits, T, N], fp32, or the compute dtype if nothing remains to be summed.
        T: rows of `out`.
        N: output features.
        tiles: along K.
        split_tiles: tiles of a program.
        group_rows: groups of a column in `group_ptr`; not read for CCQ.
        column_stride: 1, or 0 for one codebook.
        first_split: of this part of a split weight.
        LAYOUT: "ccq", "planes" or "grouped".
        WORDS: of CCQ, see `decode`.
        PLANES: bit planes.
        WIDTH: bits of a grouped integer.
        GROUP_TILES: tiles of a group, if it has more than one.
        GROUPS: of a tile.
        RUN: `Packed.run`.
        Q: elements of a tile's column.
        BN: output features of a program.
        BT: columns of the second operand: 8, or more if ROWS GROUPS is.
        ROWS: of x of a program.
        EXPERTS: blocks of tokens sorted by expert; otherwise block b is the rows from ``b ROWS``.
        SHARE: slots that share a row of x.
        BIAS: whether to add one.
        ASM: see `kernels.gpu.decode`.
        STAGES: depth of the software pipeline, for all loads.
    """
    block = tl.program_id(0)
    start = tl.program_id(1) * BN
    n = start + tl.arange(0, BN)
    split = tl.program_id(2)
    inside = n < N
    column = tl.minimum(n, N - 1)
    q = tl.arange(0, Q)
    c = tl.arange(0, BT)
    slots: tl.constexpr = BT // GROUPS  # ROWS, or more where the columns would be too few
    s = tl.arange(0, slots)
    expert = tl.full((), 0, dtype=tl.int64)
    slot_c = block * ROWS + c // GROUPS
    slot_s = block * ROWS + s
    if EXPERTS:
        expert = tl.load(expert_ptr + block).to(tl.int64)
        if expert < 0:
            return
        slot_c = tl.load(slot_ptr + slot_c, mask=c // GROUPS < ROWS, other=T)
        slot_s = tl.load(slot_ptr + slot_s, mask=s < ROWS, other=T)
    present_c = (c // GROUPS < ROWS) & (slot_c < T)
    present_s = (s < ROWS) & (slot_s < T)
    row = tl.where(present_c, slot_c // SHARE, 0).to(tl.int64)
    group = c % GROUPS
    here = present_c[None, :] & ((q[:, None] // RUN) % GROUPS == group[None, :])  # [Q, BT]
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tiles)
    at = expert * tiles + first
    FIELDS: tl.constexpr = 8 if LAYOUT == "ccq" else 16 // WIDTH
    x_at = x_ptr + (row[None, :] * tiles + first) * (FIELDS * Q) + q[:, None]
    sums_at = sums_ptr + (row * tiles + first) * GROUPS + group
    # One run of memory: no address depends on where the columns end.
    run = tl.arange(0, BN)[:, None] * Q + q[None, :]
    if LAYOUT == "ccq":
        codes_at = codes_ptr + (at * N + start) * Q + run
        scales_at = group_ptr + at * N + start + tl.arange(0, BN)
        multiplier = tl.load(multiplier_ptr + (expert * N + column) * column_stride)
        addend = tl.load(addend_ptr + (expert * N + column) * column_stride)
        if WORDS == assembly.CCQ_MIXED:
            blocks = (N + 127) // 128
            if tl.load(exact_ptr + expert * blocks + start // 128) != 0:
                acc = groups.ccq(
                    codes_at, scales_at, x_at, sums_at, here, multiplier, addend, group, first, last, N,
                    assembly.CCQ_EXACT, GROUPS, Q, BN, BT, dtype, ASM, STAGES,
                )  # fmt: skip
            else:
                acc = groups.ccq(
                    codes_at, scales_at, x_at, sums_at, here, multiplier, addend, group, first, last, N,
                    assembly.CCQ_WIDE, GROUPS, Q, BN, BT, dtype, ASM, STAGES,
                )  # fmt: skip
        else:
            acc = groups.ccq(
                codes_at, scales_at, x_at, sums_at, here, multiplier, addend, group, first, last, N,
                WORDS, GROUPS, Q, BN, BT, dtype, ASM, STAGES,
            )  # fmt: skip
        factor: tl.constexpr = 2.0 ** (_POSITION - _CCQ_LOW)
    elif LAYOUT == "planes":
        codes_at = codes_ptr + (at * PLANES * N + start) * Q + run
        scales_at = group_ptr + expert * group_rows * (PLANES + 1) * N + column[:, None]
        acc = groups.planes(
            codes_at, scales_at, x_at, sums_at, here, group, first, last, N,
            PLANES, GROUP_TILES, GROUPS, Q, BN, BT, dtype, ASM, STAGES,
        )  # fmt: skip
        factor: tl.constexpr = 2.0**_POSITION
    else:
        codes_at = codes_ptr + (at * N + start) * Q + run
        scales_at = group_ptr + expert * group_rows * N + column[:, None]
        zeros_at = zeros_ptr + expert * group_rows * N + column[:, None]
        acc = groups.grouped(
            codes_at, scales_at, zeros_at, x_at, sums_at, here, group, first, last, N,
            WIDTH, GROUP_TILES, GROUPS, Q, BN, BT, dtype, ASM, STAGES,
        )  # fmt: skip
        factor: tl.constexpr = 2.0**_POSITION

    total = tl.sum(tl.reshape(acc, (BN, slots, GROUPS)), axis=2)  # [BN, slots]
    total *= (tl.load(column_ptr + expert * N + column).to(tl.float32) * factor)[:, None]
    total *= tl.load(unit_ptr + tl.where(present_s, slot_s // SHARE, 0))[None, :]
    if BIAS:
        total += tl.load(bias_ptr + column).to(tl.float32)[:, None]
    out = out_ptr + ((first_split + split).to(tl.int64) * T + slot_s[None, :]) * N + n[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=present_s[None, :] & inside[:, None])


_SIGNATURE = {
    "x_ptr": "*fp16",
    "unit_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "codes_ptr": "*i16",
    "column_ptr": "*bf16",
    "group_ptr": "*i16",
    "zeros_ptr": "*u8",
    "multiplier_ptr": "*i32",
    "addend_ptr": "*i32",
    "exact_ptr": "*u8",
    "slot_ptr": "*i32",
    "expert_ptr": "*i32",
    "bias_ptr": "*bf16",
    "out_ptr": "*fp32",
    "T": "i32",
    "N": "i32",
    "tiles": "i32",
    "split_tiles": "i32",
    "group_rows": "i32",
    "column_stride": "i32",
    "first_split": "i32",
}
_ALIGNED = (*(name for name in _SIGNATURE if name.endswith("_ptr")), "N")


def variants() -> list[Variant]:
    """Every layout, as ERNIE-4.5's experts call it for up to two and up to four tokens; some for more."""
    few = [
        _variant(name, layout, shape, words=words, planes=planes, width=width, elements=elements, group=group)
        for shape in FEW
        for name, layout, words, planes, width, elements, group in (
            ("ccq_pair", "ccq", assembly.CCQ_PAIR.value, 0, 1, 32, 64),
            ("ccq_wide", "ccq", assembly.CCQ_WIDE.value, 0, 1, 32, 64),
            ("ccq_exact", "ccq", assembly.CCQ_EXACT.value, 0, 1, 32, 64),
            ("ccq_mixed", "ccq", assembly.CCQ_MIXED.value, 0, 1, 32, 64),
            ("planes2", "planes", 0, 2, 1, 32, 256),
            ("planes4", "planes", 0, 4, 1, 32, 256),
            ("int4_128", "grouped", 0, 0, 4, 32, 128),
        )
    ]
    many = [
        _variant(name, layout, shape, planes=planes, width=width, elements=32, group=group)
        for name, layout, planes, width, group, shape in (
            ("planes2", "planes", 2, 1, 256, SHAPES[0]),
            ("planes4", "planes", 4, 1, 256, SHAPES[0]),
            ("int4_128", "grouped", 0, 4, 128, SHAPES[0]),
            ("int4_128", "grouped", 0, 4, 128, SHAPES[-1]),
            # The most activations for a byte of codes.
            ("int2_128", "grouped", 0, 2, 128, SHAPES[-1]),
            ("int2_32", "grouped", 0, 2, 32, SHAPES[1]),
            ("planes4_32", "planes", 4, 1, 32, FEW[1]),
        )
    ]
    return [*few, *many]


def _variant(
    name: str, layout: Layout, shape: Shape, *, words: int = 0, planes: int = 0, width: int, elements: int, group: int
) -> Variant:
    features = features_for(layout, shape)
    fields = 8 if layout == "ccq" else 16 // width
    groups = max(1, elements * fields // group)
    constants = {"LAYOUT": layout, "WORDS": words, "PLANES": planes, "WIDTH": width, "GROUPS": groups, "Q": elements}
    constants |= {"RUN": 2 if layout == "ccq" else min(elements, group // fields), "GROUP_TILES": 1, "BN": features}
    columns = max(COLUMNS, shape.rows * groups)
    stages = stages_for(
        layout, shape, words=words, planes=planes, groups=groups, elements=elements, fields=fields, columns=columns
    )
    constants |= {"BT": columns, "ROWS": shape.rows, "EXPERTS": True, "SHARE": 8}
    constants |= {"BIAS": False, "ASM": True, "STAGES": stages}
    types = {"ccq": {}, "planes": {"group_ptr": "*fp16", "column_ptr": "*fp32"}, "grouped": {"group_ptr": "*fp16"}}
    return Variant(
        f"grouped_{name}_experts_{shape.rows}",
        grouped_kernel,
        _SIGNATURE | types[layout],
        constants,
        num_warps=shape.warps,
        num_stages=stages,
        aligned=_ALIGNED,
        packed_bytes=features * elements * 2 * max(planes, 1),
    )
