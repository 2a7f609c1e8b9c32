"""Machine words for the packed products: what LLVM does not find by itself, as intrinsics of numba.

The unit is a chunk of 256 input features of one output feature. Decoded, it is four planes of 64 unsigned bytes; plane
j holds the features 4r + j of the chunk, because a CCQ byte r holds those four, one in each of its windows. The bytes
are small integers with an offset (window - 32, nibble - 8, value - 128).

Activations are 16-bit integers, 32512 for the largest of a group of 64 features, written as ``256 high + low`` with
both parts signed bytes: two multiply-adds of bytes (`vpdpbusd`, four products in a lane) cost less than widening every
decoded weight to 16 bits, and an activation errs by 2^-16 of its group's largest, so that nothing has to be said about
what int8 activations do to a model.

A token's chunk of activations takes `CHUNK_BYTES`:

    0    256 high bytes, four planes
    256  256 low bytes
    512  int32 [16], minus the offset times the sum of the activations in a lane
    576  fp32 [16], a lane's step

Lane i of 16 holds bytes 4i ... 4i + 3 of all planes, so lanes 4g ... 4g + 3 are the g-th group of 64 features, and a
group's scale is one more factor of its lanes. `DOTS` need AVX-512 with VNNI, and VBMI for the tables: 64 bytes
of CCQ then cost 12 instructions (8 look-ups, 4 blends) and no arithmetic at all, against about 60 for computing the
words. `kernels.cpu.compiled` has the same in plain loops for every other machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kernels.cpu.layout import BASE, CHUNK, CHUNK_BYTES, HIGH, LOW, STEP, TABLE_BYTES, TILE, TOKENS

_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_BYTES = ir.VectorType(_I8, 64)
_HALVES = ir.VectorType(_I16, 32)
_INTS = ir.VectorType(_I32, 16)
_FLOATS = ir.VectorType(ir.FloatType(), 16)

Value = Any
"""llvmlite has no types to check against."""


def native() -> bool:
    """Whether the machine numba compiles for (this one, unless its configuration says otherwise) runs `DOTS`."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return {"+avx512vbmi", "+avx512vnni", "+avx512bw"} <= set(features.split(","))


def _pointer(element: Any) -> Any:
    """``pointer(address)``: an int64 as a pointer that can be indexed."""
    kind: Any = types.CPointer

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return kind(element)(types.int64), codegen

    return pointer


bytes_at = _pointer(types.uint8)
signed_at = _pointer(types.int8)
halves_at = _pointer(types.int16)
ints_at = _pointer(types.int32)
longs_at = _pointer(types.int64)
floats_at = _pointer(types.float32)


@intrinsic
def _take(typingctx: Any, counter: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, _I64(1), "monotonic")

    return types.int64(types.int64), codegen


take: Any = _take
"""``take(counter)``: the next task, which is the value at an address of int64, atomically increased."""


def _stack(builder: Any, kind: Any) -> Any:
    """Room on the stack; unlike numba's own allocation it is not cleared, which takes a store for each byte."""
    with builder.goto_entry_block():
        place = builder.alloca(kind)
    place.align = 64
    return place


def _room(count: int) -> Any:
    """``room()``: address of `count` bytes of the caller's stack, at a multiple of 64."""

    @intrinsic
    def room(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.ptrtoint(_stack(builder, ir.ArrayType(_I8, count)), _I64)

        return types.int64(), codegen

    return room


chunk_room = _room(4 * CHUNK)
tables_room = _room(TILE * TABLE_BYTES)
sums_room = _room(TILE * TOKENS * 64)
address_room = _room(8 * TOKENS)


# Emitters of one step each.


def _constant(vector: Any, values: Sequence[int]) -> Value:
    return ir.Constant(vector, list(values))


def _splat(vector: Any, value: int) -> Value:
    return _constant(vector, [value] * vector.count)


def _load(builder: Any, address: Value, vector: Any, *, align: int = 1) -> Value:
    pointer = builder.inttoptr(address, vector.as_pointer())
    return builder.load(pointer, align=align)


def _call(builder: Any, name: str, result: Any, arguments: Sequence[Value]) -> Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    known = builder.module.globals.get(name)
    return builder.call(ir.Function(builder.module, kind, name) if known is None else known, arguments)


def _dot4(builder: Any, total: Value, unsigned: Value, signed: Value) -> Value:
    """Lane += four products of an unsigned with a signed byte."""
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, (total, unsigned, signed))


def _look_up(builder: Any, table: Sequence[Value], codes: Value, upper: Value) -> Value:
    """Bytes of a table of 256 in four registers: two look-ups of 128, and the code's top bit chooses."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    first = _call(builder, name, _BYTES, (table[0], codes, table[1]))
    second = _call(builder, name, _BYTES, (table[2], codes, table[3]))
    return builder.select(upper, second, first)


def _ccq_planes(builder: Any, codes: Value, index: Value, table: Sequence[Sequence[Value]]) -> list[Value]:
    block = _load(builder, builder.add(codes, builder.shl(index, _I64(6))), _BYTES)
    upper = builder.icmp_signed("<", block, _splat(_BYTES, 0))
    return [_look_up(builder, plane, block, upper) for plane in table]


def _int4_planes(builder: Any, codes: Value, index: Value) -> list[Value]:
    start = builder.add(codes, builder.shl(index, _I64(7)))
    planes = []
    for half in range(2):
        block = _load(builder, builder.add(start, _I64(64 * half)), _BYTES)
        shifted = builder.bitcast(builder.lshr(builder.bitcast(block, _HALVES), _splat(_HALVES, 4)), _BYTES)
        planes += [builder.and_(block, _splat(_BYTES, 15)), builder.and_(shifted, _splat(_BYTES, 15))]
    return planes


def _int8_planes(builder: Any, codes: Value, index: Value) -> list[Value]:
    start = builder.add(codes, builder.shl(index, _I64(8)))
    return [_load(builder, builder.add(start, _I64(64 * j)), _BYTES) for j in range(4)]


def _group_scales(builder: Any, scales: Value, index: Value) -> Value:
    """Four nibbles, the even group's in the high half of its byte, each in the lanes of its group."""
    pair = builder.zext(_load(builder, builder.add(scales, builder.shl(index, _I64(1))), _I16), _I32)
    lanes = builder.insert_element(ir.Constant(_INTS, ir.Undefined), pair, _I32(0))
    lanes = builder.shuffle_vector(lanes, lanes, _splat(_INTS, 0))
    shifts = _constant(_INTS, [shift for shift in (4, 0, 12, 8) for _ in range(4)])
    return builder.sitofp(builder.and_(builder.lshr(lanes, shifts), _splat(_INTS, 15)), _FLOATS)


def _dot(tokens: int, kind: str) -> Callable[..., Any]:
    """``dot(codes, scales, table, inputs, chunks, sums)``, all int64.

    Adds the products of one output feature with `tokens` tokens, over some chunks, to `sums`: the address of fp32
    [tokens, 16], lanes whose sum is the product. `codes`, `scales` (of "ccq") and `table` are addresses, `inputs` that
    of `tokens` addresses of activations.
    """

    @intrinsic
    def dot(typingctx: Any, codes: Any, scales: Any, table: Any, inputs: Any, chunks: Any, sums: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, scales, table, inputs, chunks, sums = arguments
            columns = [
                [_load(builder, builder.add(table, _I64(256 * j + 64 * i)), _BYTES, align=64) for i in range(4)]
                for j in range(4 if kind == "ccq" else 0)
            ]
            rows = [_load(builder, builder.add(inputs, _I64(8 * t)), _I64) for t in range(tokens)]
            totals = [_stack(builder, _FLOATS) for _ in range(tokens)]
            for t, total in enumerate(totals):
                builder.store(_load(builder, builder.add(sums, _I64(64 * t)), _FLOATS, align=64), total)
            with cgutils.for_range(builder, chunks, intp=_I64) as loop:
                if kind == "ccq":
                    planes = _ccq_planes(builder, codes, loop.index, columns)
                    factor = _group_scales(builder, scales, loop.index)
                else:
                    decode = _int4_planes if kind == "int4" else _int8_planes
                    planes, factor = decode(builder, codes, loop.index), None
                offset = builder.mul(loop.index, _I64(CHUNK_BYTES))
                for row, total in zip(rows, totals, strict=True):
                    start = builder.add(row, offset)

                    def field(vector: Any, at: int, start: Value = start) -> Value:
                        return _load(builder, builder.add(start, _I64(at)), vector, align=64)

                    low, high = field(_INTS, BASE), _splat(_INTS, 0)
                    for j, plane in enumerate(planes):
                        high = _dot4(builder, high, plane, field(_BYTES, HIGH + 64 * j))
                        low = _dot4(builder, low, plane, field(_BYTES, LOW + 64 * j))
                    lanes = builder.add(low, builder.shl(high, _splat(_INTS, 8)))
                    step = field(_FLOATS, STEP)
                    if factor is not None:
                        step = builder.fmul(step, factor)
                    value = builder.sitofp(lanes, _FLOATS)
                    added = _call(builder, "llvm.fma.v16f32", _FLOATS, (value, step, builder.load(total)))
                    builder.store(added, total)
            for t, total in enumerate(totals):
                pointer = builder.inttoptr(builder.add(sums, _I64(64 * t)), _FLOATS.as_pointer())
                builder.store(builder.load(total), pointer, align=64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return dot


DOTS = {(kind, tokens): _dot(tokens, kind) for kind in ("ccq", "int4", "int8") for tokens in (1, 2, TOKENS)}
