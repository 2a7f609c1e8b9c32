"""The loops of `kernels.gpu.grouped`, one for each layout: sums of groups, and their scales."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu import assembly, decode

_POSITION = tl.constexpr(assembly.POSITION)
_CCQ_LOW = tl.constexpr(assembly.CCQ_LOW)


@triton.jit
def ccq(
    codes_at, scales_at, x_at, sums_at, here, multiplier, addend, group, first, last, N,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    dtype: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BN, BT] in units of ``2^(CCQ_LOW - POSITION)``.

    A window u stands for ``u - 32``: 32 times the group's sum is what the accumulator starts from. A group's scale is
    masked out of its 16 bits where it stands, g times 4 bits too high, as the low bits of an fp32 of 2^23.
    """
    multiplier = tl.broadcast_to(multiplier[:, None], (BN, Q))
    addend = tl.broadcast_to(addend[:, None], (BN, Q))
    nibble = (15 << (group * 4))[None, :]
    zero: tl.constexpr = -32.0 * 2.0 ** (_CCQ_LOW - _POSITION)
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for _ in tl.range(first, last, num_stages=STAGES):
        windows = decode.ccq(tl.load(codes_at), multiplier, addend, WORDS, dtype, ASM)
        acc = tl.broadcast_to((tl.load(sums_at) * zero)[None, :], (BN, BT))
        for field in tl.static_range(8):
            x = tl.load(x_at + field * Q, mask=here, other=0.0)
            acc = tl.dot(windows[field], x, acc, input_precision="ieee")
        bits = tl.load(scales_at).to(tl.int32)[:, None] & nibble
        total += acc * ((bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0)
        codes_at += N * Q
        scales_at += N
        x_at += 8 * Q
        sums_at += GROUPS
    return total * ((127 - 4 * group) << 23).to(tl.float32, bitcast=True)[None, :]


@triton.jit
def planes(
    codes_at, scales_at, x_at, sums_at, here, group, first, last, N,
    PLANES: tl.constexpr, GROUP_TILES: tl.constexpr, GROUPS: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BN, BT] in units of ``2^-POSITION``: for each group, c0 times the sum of its activations and ci times plane i's.

    Each plane has an accumulator of its own: sixteen fields of an element are a mask each.
    """
    unit: tl.constexpr = 2.0**-_POSITION
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        factors = scales_at + (tile // GROUP_TILES * GROUPS + group)[None, :] * ((PLANES + 1) * N)
        total += tl.load(factors + PLANES * N).to(tl.float32) * (tl.load(sums_at) * unit)[None, :]
        bits = ()
        sums = ()
        for plane in tl.static_range(PLANES):
            bits += (decode.fields(tl.load(codes_at + plane * N * Q), 1, dtype, ASM),)
            sums += (tl.zeros((BN, BT), dtype=tl.float32),)
        for field in tl.static_range(16):
            x = tl.load(x_at + field * Q, mask=here, other=0.0)  # for all planes at once: sixteen of them are too many
            more = ()
            for plane in tl.static_range(PLANES):
                more += (tl.dot(bits[plane][field], x, sums[plane], input_precision="ieee"),)
            sums = more
        for plane in tl.static_range(PLANES):
            total += tl.load(factors + plane * N).to(tl.float32) * sums[plane]
        codes_at += PLANES * N * Q
        x_at += 16 * Q
        sums_at += GROUPS
    return total


@triton.jit
def grouped(
    codes_at, scales_at, zeros_at, x_at, sums_at, here, group, first, last, N,
    WIDTH: tl.constexpr, GROUP_TILES: tl.constexpr, GROUPS: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BN, BT] in units of ``2^-POSITION``: for each group, ``scale (codes . x - zero sum(x))``."""
    unit: tl.constexpr = 2.0**-_POSITION
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        values = decode.fields(tl.load(codes_at), WIDTH, dtype, ASM)
        acc = tl.zeros((BN, BT), dtype=tl.float32)
        for field in tl.static_range(16 // WIDTH):
            x = tl.load(x_at + field * Q, mask=here, other=0.0)
            acc = tl.dot(values[field], x, acc, input_precision="ieee")
        groups = (tile // GROUP_TILES * GROUPS + group)[None, :] * N
        zero = tl.load(zeros_at + groups).to(tl.float32)
        total += (acc - zero * (tl.load(sums_at) * unit)[None, :]) * tl.load(scales_at + groups).to(tl.float32)
        codes_at += N * Q
        x_at += (16 // WIDTH) * Q
        sums_at += GROUPS
    return total
