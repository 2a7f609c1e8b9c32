"""Vector instructions, emitted one step at a time; by name where LLVM does not find them by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core.registry import cpu_target

from kernels.cpu.words import F32, I8, I16, I32, I64, Value, function

BYTES = ir.VectorType(I8, 64)
HALVES = ir.VectorType(I16, 32)
INTS = ir.VectorType(I32, 16)
FLOATS = ir.VectorType(F32, 16)


def cpu_features() -> set[str]:
    """Of the machine that numba compiles for."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return set(features.split(","))


def constant(vector: Any, values: Sequence[int]) -> Value:
    """A vector of these numbers."""
    return ir.Constant(vector, list(values))


def splat(vector: Any, value: int) -> Value:
    """A vector of one number."""
    return constant(vector, [value] * vector.count)


def load(builder: Any, address: Value, vector: Any, *, align: int = 1) -> Value:
    """What stands at an int64 address."""
    pointer = builder.inttoptr(address, vector.as_pointer())
    return builder.load(pointer, align=align)


def store(builder: Any, value: Value, address: Value, *, align: int = 1) -> None:
    """Write a value to an int64 address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def call(builder: Any, name: str, result: Any, arguments: Sequence[Value]) -> Value:
    """One of LLVM's intrinsics, by name."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(function(builder, name, kind), arguments)


def at(builder: Any, address: Value, *terms: tuple[Value, int] | int) -> Value:
    """``address`` plus numbers and (index, bytes) products."""
    for term in terms:
        offset = I64(term) if isinstance(term, int) else builder.mul(term[0], I64(term[1]))
        address = builder.add(address, offset)
    return address


def dot4(builder: Any, total: Value, unsigned: Value, signed: Value) -> Value:
    """Lane += four products of an unsigned with a signed byte."""
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, (total, unsigned, signed))


def dot2(builder: Any, total: Value, first: Value, second: Value, features: set[str]) -> Value:
    """Lane += two products of 16-bit integers."""
    if "+avx512bw" in features:  # with VNNI, LLVM makes one instruction of it
        pairs = call(builder, "llvm.x86.avx512.pmaddw.d.512", INTS, (first, second))
        return builder.add(total, pairs)
    if "+avx2" in features:
        parts = []
        for half in (range(16), range(16, 32)):
            picked = [builder.shuffle_vector(v, v, constant(ir.VectorType(I32, 16), half)) for v in (first, second)]
            parts.append(call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), picked))
        return builder.add(total, builder.shuffle_vector(*parts, constant(INTS, range(16))))
    wide = ir.VectorType(I32, 32)
    products = builder.mul(builder.sext(first, wide), builder.sext(second, wide))
    even, odd = (builder.shuffle_vector(products, products, constant(INTS, range(o, 32, 2))) for o in (0, 1))
    return builder.add(total, builder.add(even, odd))


def multiply_add(builder: Any, value: Value, factor: Value, total: Value) -> Value:
    """Rounded once where the machine can."""
    return builder.fadd(builder.fmul(value, factor, flags=("contract",)), total, flags=("contract",))
