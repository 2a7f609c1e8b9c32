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
| int4, grouped or not | 1.25 | 2.5 |
| int8, grouped or not | 0.5 | 1 |
| a bit plane | 4.25 | about 12 |

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
CCQ_MIXED = tl.constexpr(3)
"""CCQ_WIDE, but for blocks of output features that are marked: CCQ_EXACT."""

POSITION = 24
"""A field at bit b of an fp16's mantissa, the rest zero, is worth itself times ``2^(b - POSITION)`` (IEEE 754)."""
CCQ_SCALE = 11
"""Scaled windows of CCQ carry group scales times ``2^CCQ_SCALE``, which keeps every product a normal fp16."""
CCQ_HIGH, CCQ_LOW = 4, 1
"""Bits at which the windows 0 and 2, and 1 and 3, of a word stand."""
MANTISSA = 10
"""Bits of an fp16 where a field can stand."""

_REGISTERS = "{\n.reg .b32 c0,c1,c2,c3,r0,r1,r2,r3,p,q,h,l;\n.reg .f32 f;\n"
_HIGH, _LOW = "0x03F003F0", "0x007E007E"


def _bytes(source: str, magic: str, select: str) -> str:
    return "".join(f"prmt.b32 c{i}, {source}, {magic}, 0x{select}{i};\n" for i in range(4))


def _words(kind: int, codes: str, multiplier: str, addend: str) -> str:
    """Four bytes -> p and q: words of the lower, and of the upper bytes of two elements, at bits 1 ... 15 of halves."""
    if kind == CCQ_PAIR.value:
        return (
            # Two bytes, 16 bits apart.
            f"prmt.b32 p, {codes}, 0, 0x4240;\nprmt.b32 q, {codes}, 0, 0x4341;\n"
            f"mad.lo.u32 p, p, {multiplier}, {addend};\nmad.lo.u32 q, q, {multiplier}, {addend};\n"
        )
    if kind == CCQ_WIDE.value:
        return (
            _bytes(codes, "0", "444")
            + "".join(f"mad.lo.u32 r{i}, c{i}, {multiplier}, {addend};\n" for i in range(4))
            + "prmt.b32 p, r0, r2, 0x7632;\nprmt.b32 q, r1, r3, 0x7632;\n"  # upper halves
        )
    return (
        _bytes(codes, "0x4B000000", "744")  # 2^23 + c
        + f"mul.rn.f32 f, {multiplier}, 0fCB000000;\n"  # -2^23 s, exact; invariant in the loop, so hoisted or shared
        + "".join(
            f"fma.rn.f32 r{i}, c{i}, {multiplier}, f;\n"  # rounds once: c s
            f"add.rn.f32 r{i}, r{i}, {addend};\n"
            f"add.rm.f32 r{i}, r{i}, 0f4AC00001;\n"  # + 1.5 2^22 + 0.5, down to a multiple of 0.5: the floor at bit 1
            for i in range(4)
        )
        + "prmt.b32 p, r0, r2, 0x5410;\nprmt.b32 q, r1, r3, 0x5410;\n"  # lower halves
    )


def _windows(scaled: bool) -> str:
    """p and q -> $0-$7: windows at bits 10, 7, 4, 1 of the halves, those of p first.

    Scaled: $13 is the scale, $14 and $15 what to add at the bits `CCQ_HIGH` and `CCQ_LOW`.
    """
    lines = ["shr.u32 h, p, 6;", "shr.u32 l, q, 6;"]
    for window, (sources, mask, addend) in enumerate(
        (("hl", _HIGH, 14), ("hl", _LOW, 15), ("pq", _HIGH, 14), ("pq", _LOW, 15))
    ):
        for half, source in enumerate(sources):
            out = f"${2 * window + half}"
            lines.append(f"and.b32 {out}, {source}, {mask};")
            if scaled:
                lines.append(f"fma.rn.f16x2 {out}, {out}, $13, ${addend};")
    return "\n".join([*lines, "}"])


def _ccq(kind: int, *, scaled: bool) -> str:
    return _REGISTERS + _words(kind, "$8", "$9", "$11") + _windows(scaled)


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


def position(field: int, width: int) -> int:
    """Bit of the mantissa where field `field` of `width` bits of a 16-bit element stands once it is masked.

    Fields that reach over the mantissa are brought down by one shift for all of them.
    """
    whole = MANTISSA // width  # fields that lie in the mantissa as they are
    return (field - whole if field >= whole else field) * width


def _fields(width: int) -> str:
    """The register $F -> its F = 16 / width fields, the lowest first."""
    count, whole = 16 // width, MANTISSA // width
    lines = [f"{{\n.reg .b32 h;\nshr.u32 h, ${count}, {whole * width};"]
    for field in range(count):
        mask = ((1 << width) - 1 << position(field, width)) * 0x10001
        lines.append(f"and.b32 ${field}, {'h' if field >= whole else f'${count}'}, {mask:#010x};")
    return "\n".join([*lines, "}"])


def _planes(count: int) -> str:
    """Elements of `count` planes ($16 on), then c1 ... ck and c0, to sixteen fields."""
    first = 16 + count  # of the coefficients
    lines = ["{\n.reg .b32 t,m,o;", f".reg .b32 {','.join(f'h{i}' for i in range(count))};"]
    lines += [f"shr.u32 h{i}, ${16 + i}, {MANTISSA};" for i in range(count)]
    for field in range(16):
        bit = position(field, 1)
        scale, offset = (15 - bit) << 10, (25 - bit) << 10 | 0x8000  # fp16 2^-bit and -2^(10 - bit)
        lines += [f"mov.b32 m, {scale * 0x10001:#010x};", f"mov.b32 o, {offset * 0x10001:#010x};"]
        total = f"${first + count}"
        for i in range(count):
            source = f"h{i}" if field >= MANTISSA else f"${16 + i}"
            lines += [
                f"lop3.b32 t, {source}, {(1 << bit) * 0x10001:#010x}, 0x64006400, 0xEA;",
                "fma.rn.f16x2 t, t, m, o;",  # the bit as 0 or 1
                f"fma.rn.f16x2 ${field}, t, ${first + i}, {total};",
            ]
            total = f"${field}"
    return "\n".join([*lines, "}"])


def constraints(outputs: int, inputs: int) -> str:
    """Operands of an assembly text, each a 32-bit register; outputs are written while inputs are still to be read."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


ASM_CCQ = tl.constexpr(tuple(_ccq(kind, scaled=False) for kind in range(3)))
ASM_CCQ_SCALED = tl.constexpr(tuple(_ccq(kind, scaled=True) for kind in range(3)))
ASM_FIELDS = tl.constexpr({width: _fields(width) for width in (1, 2, 4, 8)})
ASM_INT8 = tl.constexpr(_INT8)
ASM_INT4 = tl.constexpr(_INT4)
ASM_PLANES = tl.constexpr({count: _planes(count) for count in (2, 3, 4)})
_CCQ_OPERANDS = tl.constexpr(constraints(8, 5))
_CCQ_SCALED_OPERANDS = tl.constexpr(constraints(8, 8))
_FIELDS_OPERANDS = tl.constexpr({width: constraints(16 // width, 1) for width in (1, 2, 4, 8)})
_INT8_OPERANDS = tl.constexpr(constraints(2, 1))
_INT4_OPERANDS = tl.constexpr(constraints(4, 1))
_PLANES_OPERANDS = tl.constexpr({count: constraints(16, 2 * count + 1) for count in (2, 3, 4)})
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
            ASM_CCQ[WORDS], _CCQ_OPERANDS, [codes, multiplier, addend], dtype=_HALF8, is_pure=True, pack=2
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
            _CCQ_SCALED_OPERANDS,
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
            ASM_FIELDS[WIDTH], _FIELDS_OPERANDS[WIDTH], [codes], dtype=_HALVES[WIDTH], is_pure=True, pack=2
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
            ASM_PLANES[PLANES], _PLANES_OPERANDS[PLANES], elements + factors, dtype=_HALF16, is_pure=True, pack=2
        )
    else:
        out = ()
        for field in tl.static_range(16):
            value = factors[PLANES]
            for i in tl.static_range(PLANES):
                value += (elements[i].to(tl.int32) >> field & 1).to(dtype) * factors[i]
            out += (value,)
    return out
