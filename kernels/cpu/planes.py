"""The four planes of a chunk of packed codes, emitted for each kind of code; see `kernels.cpu.vector`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from kernels.cpu.emit import BYTES, FLOATS, HALVES, INTS, at, call, constant, load, splat
from kernels.cpu.layout import LINE_AT
from kernels.cpu.words import I16, I32, Value

KINDS = ("ccq", "int4", "int8", "line")
"""Names of `kernels.cpu.layout`'s kinds."""


def _look_up(builder: Any, table: Sequence[Value], codes: Value, upper: Value) -> Value:
    """Bytes of a table of 256 in four registers: two look-ups of 128, and the code's top bit chooses."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    first = call(builder, name, BYTES, (table[0], codes, table[1]))
    second = call(builder, name, BYTES, (table[2], codes, table[3]))
    return builder.select(upper, second, first)


def _table(builder: Any, address: Value) -> list[list[Value]]:
    return [
        [load(builder, at(builder, address, 256 * j + 64 * i), BYTES) for i in range(4)] for j in range(4)
    ]  # fmt: skip


def _line(builder: Any, table: Value) -> list[Value]:
    """a and b of `LINE`, each in all lanes."""
    numbers = []
    for i in range(2):
        number = load(builder, at(builder, table, LINE_AT + 2 * i), I16)
        lanes = builder.insert_element(ir.Constant(HALVES, ir.Undefined), number, I32(0))
        numbers.append(builder.shuffle_vector(lanes, lanes, splat(ir.VectorType(I32, 32), 0)))
    return numbers


def _line_planes(builder: Any, codes: Value, line: Sequence[Value]) -> list[Value]:
    """Words of 32 codes at a time, of each eight neighbours' first or second four, and of those two windows."""
    block, zeros = load(builder, codes, BYTES), splat(BYTES, 0)
    planes = []
    for half in range(2):
        # Every other of these bytes is one of `zeros`: unpacking within 128 bits is one instruction.
        places = [16 * (i // 16) + 8 * half + i % 16 // 2 + 64 * (i % 2) for i in range(64)]
        wide = builder.shuffle_vector(block, zeros, constant(ir.VectorType(I32, 64), places))
        products = builder.add(builder.mul(builder.bitcast(wide, HALVES), line[0]), line[1])
        words = builder.bitcast(builder.lshr(products, splat(HALVES, 1)), BYTES)
        for pair in range(2):
            starts = [16 * (i % 4) + 9 - 3 * (2 * pair + i % 8 // 4) for i in range(64)]
            control = constant(BYTES, starts)
            shifted = call(builder, "llvm.x86.avx512.pmultishift.qb.512", BYTES, (control, words))
            planes.append(builder.and_(shifted, splat(BYTES, 63)))
    return planes


def codebook(builder: Any, kind: str, table: Value) -> list[Any]:
    """What `planes_of` needs of the codebook at an address, in registers."""
    if kind == "line":
        return _line(builder, table)
    return _table(builder, table) if kind == "ccq" else []


def planes_of(builder: Any, kind: str, codes: Value, table: Sequence[Any]) -> list[Value]:
    """The four planes of the chunk at `codes`, unsigned."""
    if kind == "line":
        return _line_planes(builder, codes, table)
    if kind == "ccq":
        block = load(builder, codes, BYTES)
        upper = builder.icmp_signed("<", block, splat(BYTES, 0))
        return [_look_up(builder, plane, block, upper) for plane in table]
    if kind == "int8":
        return [load(builder, at(builder, codes, 64 * j), BYTES) for j in range(4)]
    planes = []
    for half in range(2):
        block = load(builder, at(builder, codes, 64 * half), BYTES)
        shifted = builder.bitcast(builder.lshr(builder.bitcast(block, HALVES), splat(HALVES, 4)), BYTES)
        planes += [builder.and_(block, splat(BYTES, 15)), builder.and_(shifted, splat(BYTES, 15))]
    return planes


def group_scales(builder: Any, address: Value) -> Value:
    """Four nibbles, the even group's in the high half of its byte, each in the lanes of its group."""
    pair = builder.zext(load(builder, address, I16), I32)
    lanes = builder.insert_element(ir.Constant(INTS, ir.Undefined), pair, I32(0))
    lanes = builder.shuffle_vector(lanes, lanes, splat(INTS, 0))
    shifts = constant(INTS, [shift for shift in (4, 0, 12, 8) for _ in range(4)])
    return builder.sitofp(builder.and_(builder.lshr(lanes, shifts), splat(INTS, 15)), FLOATS)
