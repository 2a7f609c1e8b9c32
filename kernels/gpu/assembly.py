"""The texts of `kernels.gpu.decode`, in PTX.

A text takes one or more registers of codes, two elements of 16 bits or four bytes each, and leaves registers of two
fp16. `tests/kernels/gpu/test_decode.py` runs them instruction by instruction.
"""

from __future__ import annotations

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
CCQ_OPERANDS = tl.constexpr(constraints(8, 5))
CCQ_SCALED_OPERANDS = tl.constexpr(constraints(8, 8))
FIELDS_OPERANDS = tl.constexpr({width: constraints(16 // width, 1) for width in (1, 2, 4, 8)})
INT8_OPERANDS = tl.constexpr(constraints(2, 1))
INT4_OPERANDS = tl.constexpr(constraints(4, 1))
PLANES_OPERANDS = tl.constexpr({count: constraints(16, 2 * count + 1) for count in (2, 3, 4)})
