"""Bytes of packed weights -> the operands of a tensor-core product, in registers.

Every function takes a tile of bytes uint8 [BN, Q] (BN output features; Q bytes along the input features) and gives one
or more tiles [BN, Q] in the compute dtype: the window j of every byte. They are element by element, so the compiler
moves the layout of a tensor core's operand up to the load and nothing passes through shared memory after decoding.

``ASM`` chooses instructions of a GPU over plain operations that mean the same (Triton's interpreter and fp32 have only
these). With it four bytes, one register, become four registers of two fp16 for CCQ. fp16 because the mantissa has 10
bits: a window of 6 bits or-ed into it at bits 1 or 4 is ``1024 + 2u`` or ``1024 + 16u``, so one shift by 6 serves all
four; one packed multiply-add takes the offset away and multiplies by the group scale, exactly: ``2 v s`` has 11
significant bits.

Instructions by the byte of codes: those of the texts below; how many of them are for the integer pipe (the narrow one,
64 lanes a cycle); and the whole inner loop for eight rows on sm_90 (``python -m benchmarks.sass --only experts_8``):

| format | decoding | integer pipe | loop |
|---|---|---|---|
| CCQ, a multiply-add for a pair of bytes | 5.5 | 3 | 9.1 |
| CCQ, a multiply-add for a byte | 7 | 4 | 10.5 |
| CCQ in fp32 (words without a line of integers) | 10 | 4 | 13.5 |
| int8 | 1 | 0.5 | 2.4 |
| int4 | 2.5 | 1.5 | 4.4 |
| two bit planes | 12.5 | 4.5 | 18.1 |

A table of 256 entries was not chosen: in Triton it can only stand in L1, where 32 different addresses are several
passes, or be dealt through shared memory; and its int8 products would round the activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

CCQ_PAIR = tl.constexpr(0)
"""Words by a multiply-add for two bytes, `kernels.gpu.words.PAIR_SHIFT`."""
CCQ_WIDE = tl.constexpr(1)
"""Words by a multiply-add for each byte, `kernels.gpu.words.WIDE_SHIFT`."""
CCQ_EXACT = tl.constexpr(2)
"""Words as the reference decoder makes them, in fp32."""


def _windows(low: str, high: str) -> str:
    """Registers p and q, two words each, -> $0-$7: windows at bits 9, 6, 3, 0 of the word.

    $17 to $24 hold s/8, s and the two offsets, each as the two registers of four elements.
    """
    lines = ["shr.u32 h, p, 6;", "shr.u32 l, q, 6;"]
    for window, (source, mask) in enumerate((("hl", high), ("hl", low), ("pq", high), ("pq", low))):
        factor = 17 if mask == high else 19
        for half in range(2):
            out = f"${2 * window + half}"
            lines.append(f"lop3.b32 {out}, {source[half]}, {mask}, 0x64006400, 0xEA;")  # (source & mask) | magic
            lines.append(f"fma.rn.f16x2 {out}, {out}, ${factor + half}, ${factor + half + 4};")
    return "\n".join(lines)


_REGISTERS = "{\n.reg .b32 c0,c1,c2,c3,r0,r1,r2,r3,p,q,h,l;\n.reg .f32 f;\n"


def _bytes(magic: str, select: str) -> str:
    return "".join(f"prmt.b32 c{i}, $8, {magic}, 0x{select}{i};\n" for i in range(4))


_PAIR = (
    _REGISTERS
    # Two bytes, 16 bits apart: neighbours along K in every layout of a first operand, so of one column.
    + "prmt.b32 p, $8, 0, 0x4140;\nprmt.b32 q, $8, 0, 0x4342;\n"
    + "mad.lo.u32 p, p, $9, $13;\nmad.lo.u32 q, q, $11, $15;\n"
    + _windows("0x007E007E", "0x03F003F0")
    + "\n}"
)
_WIDE = (
    _REGISTERS
    + _bytes("0", "444")
    + "".join(f"mad.lo.u32 r{i}, c{i}, ${9 + i}, ${13 + i};\n" for i in range(4))
    + "prmt.b32 p, r0, r1, 0x7632;\nprmt.b32 q, r2, r3, 0x7632;\n"  # upper halves
    + _windows("0x007E007E", "0x03F003F0")
    + "\n}"
)
_EXACT = (
    _REGISTERS
    + _bytes("0x4B000000", "744")  # 2^23 + c
    + "".join(
        f"mul.rn.f32 f, ${9 + i}, 0fCB000000;\n"  # -2^23 s, exact; invariant in the loop, so hoisted or shared
        f"fma.rn.f32 f, c{i}, ${9 + i}, f;\n"  # rounds once: c s
        f"add.rn.f32 f, f, ${13 + i};\nadd.rn.f32 f, f, 0f3F000000;\n"
        f"add.rm.f32 r{i}, f, 0f4B400000;\n"  # + 1.5 2^23 rounding down: the floor in the low bits
        for i in range(4)
    )
    + "prmt.b32 p, r0, r1, 0x5410;\nprmt.b32 q, r2, r3, 0x5410;\n"  # lower halves
    + _windows("0x003F003F", "0x01F801F8")
    + "\n}"
)
_INT8 = """{
.reg .b32 k;
prmt.b32 $0, $2, 0x64646464, 0x4140;
prmt.b32 $1, $2, 0x64646464, 0x4342;
mov.b32 k, 0x64806480;
sub.rn.f16x2 $0, $0, k;
sub.rn.f16x2 $1, $1, k;
}"""
_INT4 = """{
.reg .b32 p,q,k,m,o;
prmt.b32 p, $4, 0, 0x4140;
prmt.b32 q, $4, 0, 0x4342;
lop3.b32 $0, p, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $1, q, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $2, p, 0x00F000F0, 0x64006400, 0xEA;
lop3.b32 $3, q, 0x00F000F0, 0x64006400, 0xEA;
mov.b32 k, 0x64086408;
mov.b32 m, 0x2C002C00;
mov.b32 o, 0xD480D480;
sub.rn.f16x2 $0, $0, k;
sub.rn.f16x2 $1, $1, k;
fma.rn.f16x2 $2, $2, m, o;
fma.rn.f16x2 $3, $3, m, o;
}"""


def _planes(count: int) -> str:
    """Bytes of `count` planes ($16 on), then their coefficients and c0 (two registers each), to eight windows."""
    first = 16 + count  # of the coefficients
    lines = ["{\n.reg .b32 t,m,o;", f".reg .b32 {','.join(f'p{i},q{i}' for i in range(count))};"]
    for i in range(count):
        lines += [f"prmt.b32 p{i}, ${16 + i}, 0, 0x4140;", f"prmt.b32 q{i}, ${16 + i}, 0, 0x4342;"]
    for bit in range(8):
        scale, offset = (15 - bit) << 10, (25 - bit) << 10 | 0x8000  # fp16 2^-bit and -2^(10 - bit)
        lines += [f"mov.b32 m, {scale * 0x10001:#010x};", f"mov.b32 o, {offset * 0x10001:#010x};"]
        for half, source in enumerate("pq"):
            out, total = f"${2 * bit + half}", f"${first + 2 * count + half}"
            for i in range(count):
                lines += [
                    f"lop3.b32 t, {source}{i}, {(1 << bit) * 0x10001:#010x}, 0x64006400, 0xEA;",
                    "fma.rn.f16x2 t, t, m, o;",  # the bit as 0 or 1
                    f"fma.rn.f16x2 {out}, t, ${first + 2 * i + half}, {total};",
                ]
                total = out
    return "\n".join([*lines, "}"])


def constraints(outputs: int, inputs: int) -> str:
    """Operands of an assembly text, each a 32-bit register; outputs are written while inputs are still to be read."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


ASM_CCQ = tl.constexpr((_PAIR, _WIDE, _EXACT))
ASM_INT8 = tl.constexpr(_INT8)
ASM_INT4 = tl.constexpr(_INT4)
ASM_PLANES = tl.constexpr({count: _planes(count) for count in (2, 3, 4)})
_CCQ_OPERANDS = tl.constexpr(constraints(8, 17))
_INT8_OPERANDS = tl.constexpr(constraints(2, 1))
_INT4_OPERANDS = tl.constexpr(constraints(4, 1))
_PLANES_OPERANDS = tl.constexpr({count: constraints(16, 3 * count + 2) for count in (2, 3, 4)})
_HALF4 = tl.constexpr((tl.float16,) * 4)
_HALF2 = tl.constexpr((tl.float16,) * 2)
_HALF8 = tl.constexpr((tl.float16,) * 8)


@triton.jit
def int8(codes, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes ``value + 128`` -> the values."""
    if ASM:
        return tl.inline_asm_elementwise(ASM_INT8, _INT8_OPERANDS, [codes], dtype=tl.float16, is_pure=True, pack=4)
    return (codes.to(tl.int32) - 128).to(dtype)


@triton.jit
def int4(codes, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes of two nibbles ``value + 8`` -> the values of the low ones, and of the high ones."""
    if ASM:
        return tl.inline_asm_elementwise(ASM_INT4, _INT4_OPERANDS, [codes], dtype=_HALF2, is_pure=True, pack=4)
    wide = codes.to(tl.int32)
    return ((wide & 15) - 8).to(dtype), ((wide >> 4) - 8).to(dtype)


@triton.jit
def ccq(codes, multiplier, addend, scale, WORDS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes -> their four windows ``v * scale`` (times 2 for integer words), v in -32..31, the highest bits first.

    Args:
        codes: uint8 [BN, Q].
        multiplier: int32 [BN, Q], of each column; bits of fp32 if WORDS is CCQ_EXACT.
        addend: likewise.
        scale: the group scales, 0..15, fp16 (with ASM) or `dtype` [BN, Q].
        WORDS: CCQ_PAIR, CCQ_WIDE or CCQ_EXACT.
        dtype: of the result; fp16 with ASM.
        ASM: see the module.
    """
    if ASM:
        high = scale * 0.125
        if WORDS == CCQ_EXACT:
            offset_high = scale * -160.0
            offset = scale * -1056.0
        else:
            offset_high = scale * -192.0
            offset = scale * -1088.0
        return tl.inline_asm_elementwise(
            ASM_CCQ[WORDS],
            _CCQ_OPERANDS,
            [codes, multiplier, addend, high, scale, offset_high, offset],
            dtype=_HALF4,
            is_pure=True,
            pack=4,
        )
    if WORDS == CCQ_EXACT:
        real = codes.to(tl.float32) * multiplier.to(tl.float32, bitcast=True)
        word = tl.floor(real + addend.to(tl.float32, bitcast=True) + 0.5).to(tl.int32)
        factor = scale
    else:
        if WORDS == CCQ_PAIR:
            word = (codes.to(tl.int32) * multiplier + (addend & 0xFFFF)) >> 1
        else:
            word = (codes.to(tl.int32) * multiplier + addend) >> 17
        factor = scale * 2
    a = (((word >> 9) & 63) - 32).to(dtype) * factor
    b = (((word >> 6) & 63) - 32).to(dtype) * factor
    c = (((word >> 3) & 63) - 32).to(dtype) * factor
    d = ((word & 63) - 32).to(dtype) * factor
    return a, b, c, d


@triton.jit
def planes(bytes_, factors, PLANES: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes of each plane -> eight windows ``c0 + c1 b1 + ... + ck bk``, b the bit j of the plane's byte.

    Args:
        bytes_: tuple of uint8 [BN, Q], one of each plane.
        factors: tuple of c1, ... ck, c0, fp16 (with ASM) or `dtype` [BN, Q].
        PLANES: k, 2 to 4.
        dtype: of the result; fp16 with ASM.
        ASM: see the module.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_PLANES[PLANES], _PLANES_OPERANDS[PLANES], bytes_ + factors, dtype=_HALF8, is_pure=True, pack=4
        )
    shift = factors[PLANES]
    w0, w1, w2, w3, w4, w5, w6, w7 = shift, shift, shift, shift, shift, shift, shift, shift
    for i in tl.static_range(PLANES):
        bits = bytes_[i].to(tl.int32)
        w0 += (bits & 1).to(dtype) * factors[i]
        w1 += (bits >> 1 & 1).to(dtype) * factors[i]
        w2 += (bits >> 2 & 1).to(dtype) * factors[i]
        w3 += (bits >> 3 & 1).to(dtype) * factors[i]
        w4 += (bits >> 4 & 1).to(dtype) * factors[i]
        w5 += (bits >> 5 & 1).to(dtype) * factors[i]
        w6 += (bits >> 6 & 1).to(dtype) * factors[i]
        w7 += (bits >> 7 & 1).to(dtype) * factors[i]
    return w0, w1, w2, w3, w4, w5, w6, w7
