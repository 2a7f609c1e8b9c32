"""The product with packed weights: one kernel for decode and prefill, for one matrix and for experts."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu import decode


# Sizes that change from step to step must not make new kernels.
@triton.jit(do_not_specialize=["T", "split_tiles", "first_split"])
def multiply_kernel(
    x_ptr,
    unit_ptr,
    codes_ptr,
    column_ptr,
    group_ptr,
    multiplier_ptr,
    addend_ptr,
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
    first_split,
    LAYOUT: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
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
        slot_ptr: int32 [blocks, BT], rows of `out` in a block, T or more where there is none; with EXPERTS.
        expert_ptr: int32 [blocks], -1 for an empty block; with EXPERTS.
        bias_ptr: [N], with BIAS.
        out_ptr: [splits, T, N], fp32, or the compute dtype if nothing remains to be summed.
        T: rows of `out`.
        N: output features.
        K: input features.
        tiles: along K.
        split_tiles: tiles of a program.
        group_rows: rows of `Packed.group_scales`.
        x_stride: of rows of x.
        first_split: of this part of a split weight.
        LAYOUT: `Packed.layout`.
        WORDS: of CCQ, see `decode.ccq`.
        PLANES: bit planes.
        GROUP_SIZE: of bit planes.
        Q: bytes of a tile's column.
        BN: output features of a program.
        BT: rows of x of a program.
        EXPERTS: blocks of tokens sorted by expert; otherwise block b is the rows from ``b BT``.
        SHARE: slots that share a row of x.
        BIAS: whether to add one.
        ASM: see `kernels.gpu.decode`.
    """
    block = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    t = tl.arange(0, BT)
    q = tl.arange(0, Q)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if EXPERTS:
        expert = tl.load(expert_ptr + block).to(tl.int64)
        if expert < 0:
            return
        slot = tl.load(slot_ptr + block * BT + t)
    else:
        expert = tl.full((), 0, dtype=tl.int64)
        slot = block * BT + t
    present = slot < T
    inside = n < N
    column = tl.minimum(n, N - 1)  # columns past the end repeat the last, so that loads need no mask
    row = tl.where(present, slot // SHARE, 0).to(tl.int64)
    if LAYOUT == "ccq":
        multiplier = tl.broadcast_to(tl.load(multiplier_ptr + expert * N + column)[:, None], (BN, Q))
        addend = tl.broadcast_to(tl.load(addend_ptr + expert * N + column)[:, None], (BN, Q))

    acc = tl.zeros((BN, BT), dtype=tl.float32)
    x_rows = x_ptr + row[None, :] * x_stride + q[:, None]  # [Q, BT]
    first = split * split_tiles
    for tile in range(first, tl.minimum(first + split_tiles, tiles)):
        at = expert * tiles + tile
        if LAYOUT == "dense":
            k = tile * Q + q
            codes = tl.load(codes_ptr + (expert * N + column[:, None]) * K + k[None, :], mask=k[None, :] < K, other=0.0)
            x = tl.load(x_rows + tile * Q, mask=present[None, :] & (k[:, None] < K), other=0.0)
            acc = tl.dot(codes, x, acc, input_precision="ieee")
        elif LAYOUT == "int8":
            codes = tl.load(codes_ptr + (at * N + column[:, None]) * Q + q[None, :])
            x = tl.load(x_rows + tile * Q, mask=present[None, :], other=0.0)
            acc = tl.dot(decode.int8(codes, dtype, ASM), x, acc, input_precision="ieee")
        elif LAYOUT == "int4":
            codes = tl.load(codes_ptr + (at * N + column[:, None]) * Q + q[None, :])
            low, high = decode.int4(codes, dtype, ASM)
            x0 = tl.load(x_rows + tile * (2 * Q), mask=present[None, :], other=0.0)
            x1 = tl.load(x_rows + (tile * (2 * Q) + Q), mask=present[None, :], other=0.0)
            acc = tl.dot(low, x0, acc, input_precision="ieee")
            acc = tl.dot(high, x1, acc, input_precision="ieee")
        elif LAYOUT == "ccq":
            G: tl.constexpr = Q // 16
            codes = tl.load(codes_ptr + (at * N + column[:, None]) * Q + q[None, :])
            group = tile * G + tl.arange(0, G)
            nibbles = tl.load(group_ptr + (expert * group_rows + group[None, :] // 2) * N + column[:, None])
            scale = ((nibbles.to(tl.int32) >> (4 - group % 2 * 4)[None, :]) & 15).to(dtype)  # [BN, G]
            scale = tl.reshape(tl.broadcast_to(scale[:, None, :, None], (BN, 4, G, 4)), (BN, Q))
            a, b, c, d = decode.ccq(codes, multiplier, addend, scale, WORDS, dtype, ASM)
            x0 = tl.load(x_rows + tile * (4 * Q), mask=present[None, :], other=0.0)
            x1 = tl.load(x_rows + (tile * (4 * Q) + Q), mask=present[None, :], other=0.0)
            x2 = tl.load(x_rows + (tile * (4 * Q) + 2 * Q), mask=present[None, :], other=0.0)
            x3 = tl.load(x_rows + (tile * (4 * Q) + 3 * Q), mask=present[None, :], other=0.0)
            acc = tl.dot(a, x0, acc, input_precision="ieee")
            acc = tl.dot(b, x1, acc, input_precision="ieee")
            acc = tl.dot(c, x2, acc, input_precision="ieee")
            acc = tl.dot(d, x3, acc, input_precision="ieee")
        else:
            GROUPS: tl.constexpr = 1 if GROUP_SIZE >= 8 * Q else 8 * Q // GROUP_SIZE
            group = tile * (8 * Q) // GROUP_SIZE + tl.arange(0, GROUPS)
            base = group_ptr + (expert * group_rows + group[None, :]) * (PLANES + 1) * N + column[:, None]
            bytes_ = ()
            factors = ()
            for i in tl.static_range(PLANES + 1):
                factor = tl.load(base + i * N).to(dtype)
                factors += (tl.reshape(tl.broadcast_to(factor[:, :, None], (BN, GROUPS, Q // GROUPS)), (BN, Q)),)
            for i in tl.static_range(PLANES):
                bytes_ += (tl.load(codes_ptr + ((at * PLANES + i) * N + column[:, None]) * Q + q[None, :]),)
            w0, w1, w2, w3, w4, w5, w6, w7 = decode.planes(bytes_, factors, PLANES, dtype, ASM)
            x0 = tl.load(x_rows + tile * (8 * Q), mask=present[None, :], other=0.0)
            x1 = tl.load(x_rows + (tile * (8 * Q) + Q), mask=present[None, :], other=0.0)
            x2 = tl.load(x_rows + (tile * (8 * Q) + 2 * Q), mask=present[None, :], other=0.0)
            x3 = tl.load(x_rows + (tile * (8 * Q) + 3 * Q), mask=present[None, :], other=0.0)
            x4 = tl.load(x_rows + (tile * (8 * Q) + 4 * Q), mask=present[None, :], other=0.0)
            x5 = tl.load(x_rows + (tile * (8 * Q) + 5 * Q), mask=present[None, :], other=0.0)
            x6 = tl.load(x_rows + (tile * (8 * Q) + 6 * Q), mask=present[None, :], other=0.0)
            x7 = tl.load(x_rows + (tile * (8 * Q) + 7 * Q), mask=present[None, :], other=0.0)
            acc = tl.dot(w0, x0, acc, input_precision="ieee")
            acc = tl.dot(w1, x1, acc, input_precision="ieee")
            acc = tl.dot(w2, x2, acc, input_precision="ieee")
            acc = tl.dot(w3, x3, acc, input_precision="ieee")
            acc = tl.dot(w4, x4, acc, input_precision="ieee")
            acc = tl.dot(w5, x5, acc, input_precision="ieee")
            acc = tl.dot(w6, x6, acc, input_precision="ieee")
            acc = tl.dot(w7, x7, acc, input_precision="ieee")

    if LAYOUT != "dense":
        acc = acc * tl.load(column_ptr + expert * N + column)[:, None]
        acc = acc * tl.load(unit_ptr + row)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + column).to(tl.float32)[:, None]
    out = out_ptr + ((first_split + split).to(tl.int64) * T + slot[None, :]) * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=present[None, :] & inside[:, None])
