"""Bytes of packed weights -> the operands of a tensor-core product, in registers.

Every function takes a tile of codes [BN, Q] (BN output features; Q elements along the input features) and gives
several tiles [BN, Q] in the compute dtype: one field of every element. CCQ, bit planes and grouped integers come in
elements of 16 bits, two to a register, so that the layout is the one a tensor core wants of fp16 and nothing moves
between lanes or through shared memory; int8 and int4 in bytes.

``ASM`` chooses instructions of a GPU over plain operations that mean the same (Triton's interpreter and fp32 have only
these).

*Raw* fields (`ccq` without a scale, `bits`, `integers`) are what a mask leaves of the register: an fp16 with a zero
exponent, a subnormal, whose value is the field times ``2^(position - 24)``. Tensor cores multiply subnormals exactly
and at full speed, so a mask is all it takes. What a field is worth, its zero point and its scale are applied to
activations (`kernels.gpu.arrange`) and to sums (`kernels.gpu.grouped`), of which there are fewer.

*Scaled* fields have the group's scale and zero point applied, one packed multiply-add for two; they serve batches whose
sums would outnumber the weights. All products of CCQ are exact: ``v s`` has 9 significant bits.

Instructions by the byte of codes, and the whole inner loop on sm_90 (``python -m benchmarks.sass``):

| format | raw | scaled |
|---|---|---|
| CCQ, a multiply-add for a pair of bytes | 3.5 | 5.5 |
| CCQ, a multiply-add for a byte | 5 | 7 |
| CCQ in fp32 (words without a line of integers) | 7 | 9 |
| integers of 4 bits (raw: grouped; scaled: WINT4) | 1.25 | 2.5 |
| integers of 8 bits (raw: grouped; scaled: WINT8) | 0.75 | 1 |
| a bit plane | 4.25 | about 12 |

A table of 256 entries was not chosen: in Triton it can only stand in L1, where 32 different addresses are several
passes, or be dealt through shared memory; and its int8 products would round the activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.assembly import (
    ASM_CCQ,
    ASM_CCQ_SCALED,
    ASM_FIELDS,
    ASM_INT4,
    ASM_INT8,
    ASM_PLANES,
    CCQ_EXACT,
    CCQ_HIGH,
    CCQ_LOW,
    CCQ_OPERANDS,
    CCQ_PAIR,
    CCQ_SCALE,
    CCQ_SCALED_OPERANDS,
    FIELDS_OPERANDS,
    INT4_OPERANDS,
    INT8_OPERANDS,
    PLANES_OPERANDS,
    POSITION,
    position,
)

_HALF2 = tl.constexpr((tl.float16,) * 2)
_HALF8 = tl.constexpr((tl.float16,) * 8)
_HALF16 = tl.constexpr((tl.float16,) * 16)
_HALVES = tl.constexpr({width: (tl.float16,) * (16 // width) for width in (1, 2, 4, 8)})
_POSITIONS = tl.constexpr({width: tuple(position(f, width) for f in range(16 // width)) for width in (1, 2, 4, 8)})
_POSITION = tl.constexpr(POSITION)
_CCQ_SCALE = tl.constexpr(CCQ_SCALE)
_CCQ_HIGH = tl.constexpr(CCQ_HIGH)
_CCQ_LOW = tl.constexpr(CCQ_LOW)


@triton.jit
def int8(codes, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes ``value + 128`` -> the values."""
    if ASM:
        return tl.inline_asm_elementwise(ASM_INT8, INT8_OPERANDS, [codes], dtype=tl.float16, is_pure=True, pack=4)
    return (codes.to(tl.int32) - 128).to(dtype)


@triton.jit
def int4(codes, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes of two nibbles ``value + 8`` -> the values of the low ones, and of the high ones."""
    if ASM:
        return tl.inline_asm_elementwise(ASM_INT4, INT4_OPERANDS, [codes], dtype=_HALF2, is_pure=True, pack=4)
    wide = codes.to(tl.int32)
    return ((wide & 15) - 8).to(dtype), ((wide >> 4) - 8).to(dtype)


@triton.jit
def _word(code, multiplier, addend, WORDS: tl.constexpr):
    """The word of each byte, int32; bits over the fifteenth mean nothing."""
    if WORDS == CCQ_EXACT:
        real = code.to(tl.float32) * multiplier.to(tl.float32, bitcast=True)
        return tl.floor(real + addend.to(tl.float32, bitcast=True) + 0.5).to(tl.int32)
    if WORDS == CCQ_PAIR:
        return (code * multiplier + (addend & 0xFFFF)) >> 1
    return (code * multiplier + addend) >> 17


@triton.jit
def ccq(codes, multiplier, addend, WORDS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Elements of two bytes -> eight raw windows ``u 2^(position - 24)``, u in 0..63: of each byte, the highest first.

    Args:
        codes: int16 [BN, Q].
        multiplier: int32 [BN, Q], of each column; bits of fp32 if WORDS is CCQ_EXACT.
        addend: likewise.
        WORDS: CCQ_PAIR, CCQ_WIDE or CCQ_EXACT.
        dtype: of the result; fp16 with ASM.
        ASM: see the module.
    """
    if ASM:
        out = tl.inline_asm_elementwise(
            ASM_CCQ[WORDS], CCQ_OPERANDS, [codes, multiplier, addend], dtype=_HALF8, is_pure=True, pack=2
        )
    else:
        low = _word(codes.to(tl.int32) & 255, multiplier, addend, WORDS)
        high = _word(codes.to(tl.int32) >> 8 & 255, multiplier, addend, WORDS)
        out = ()
        for window in tl.static_range(4):
            unit: tl.constexpr = 2.0 ** ((_CCQ_LOW if window % 2 else _CCQ_HIGH) - _POSITION)
            shift: tl.constexpr = 9 - 3 * window
            out += (((low >> shift & 63).to(tl.float32) * unit).to(dtype),)
            out += (((high >> shift & 63).to(tl.float32) * unit).to(dtype),)
    return out


@triton.jit
def ccq_scaled(codes, multiplier, addend, scale, WORDS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """As `ccq`, but windows ``v scale 2^(position - 24)``, v in -32..31.

    Args:
        codes: int16 [BN, Q].
        multiplier: int32 [BN, Q].
        addend: int32 [BN, Q].
        scale: `dtype` [BN, Q]: 0..15 times ``2^CCQ_SCALE``, one for both elements of a register.
        WORDS: as for `ccq`.
        dtype: of the result; fp16 with ASM.
        ASM: see the module.
    """
    if ASM:
        high = scale * (-(2.0 ** (5 + _CCQ_HIGH - _POSITION)))  # 32 of the units of a window
        low = scale * (-(2.0 ** (5 + _CCQ_LOW - _POSITION)))
        out = tl.inline_asm_elementwise(
            ASM_CCQ_SCALED[WORDS],
            CCQ_SCALED_OPERANDS,
            [codes, multiplier, addend, scale, high, low],
            dtype=_HALF8,
            is_pure=True,
            pack=2,
        )
    else:
        raw = ccq(codes, multiplier, addend, WORDS, tl.float32, ASM)
        out = ()
        for field in tl.static_range(8):
            zero: tl.constexpr = 2.0 ** (5 + (_CCQ_LOW if field // 2 % 2 else _CCQ_HIGH) - _POSITION)
            out += (((raw[field] - zero) * scale.to(tl.float32)).to(dtype),)
    return out


@triton.jit
def fields(codes, WIDTH: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Elements of 16 bits -> 16 / WIDTH raw fields, the lowest first: each times ``2^(position(field) - 24)``."""
    if ASM:
        out = tl.inline_asm_elementwise(
            ASM_FIELDS[WIDTH], FIELDS_OPERANDS[WIDTH], [codes], dtype=_HALVES[WIDTH], is_pure=True, pack=2
        )
    else:
        out = ()
        for field in tl.static_range(16 // WIDTH):
            value = codes.to(tl.int32) >> (field * WIDTH) & ((1 << WIDTH) - 1)
            out += ((value.to(tl.float32) * 2.0 ** (_POSITIONS[WIDTH][field] - _POSITION)).to(dtype),)
    return out


@triton.jit
def planes(elements, factors, PLANES: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Elements of each plane -> sixteen fields ``c0 + c1 b1 + ... + ck bk``, b the bit j of the plane's element.

    Args:
        elements: tuple of int16 [BN, Q], one of each plane.
        factors: tuple of c1, ... ck, c0 of `dtype` [BN, Q], one for both elements of a register.
        PLANES: k, 2 to 4.
        dtype: of the result; fp16 with ASM.
        ASM: see the module.
    """
    if ASM:
        out = tl.inline_asm_elementwise(
            ASM_PLANES[PLANES], PLANES_OPERANDS[PLANES], elements + factors, dtype=_HALF16, is_pure=True, pack=2
        )
    else:
        out = ()
        for field in tl.static_range(16):
            value = factors[PLANES]
            for i in tl.static_range(PLANES):
                value += (elements[i].to(tl.int32) >> field & 1).to(dtype) * factors[i]
            out += (value,)
    return out
