"""Machine words for the compiled kernels: addresses, room on the stack, and what threads agree by."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()

Value = Any
"""llvmlite has no types to check against."""


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


def stack(builder: Any, kind: Any) -> Any:
    """Room on the stack; unlike numba's own allocation it is not cleared, which takes a store for each byte."""
    with builder.goto_entry_block():
        place = builder.alloca(kind)
    place.align = 64
    return place


def room(count: int) -> Any:
    """``room()``: address of `count` bytes of the caller's stack, at a multiple of 64."""

    @intrinsic
    def place(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.ptrtoint(stack(builder, ir.ArrayType(I8, count)), I64)

        return types.int64(), codegen

    return place


def sum_lanes(builder: Any, lanes: Value) -> Value:
    """Sixteen fp32, added in halves: in this order in every product."""
    width = 8
    while width:
        kind = ir.VectorType(I32, width)
        halves = [
            builder.shuffle_vector(lanes, lanes, ir.Constant(kind, list(range(first, first + width))))
            for first in (0, width)
        ]
        lanes = builder.fadd(*halves)
        width //= 2
    return builder.extract_element(lanes, I32(0))


@intrinsic
def _sum(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.VectorType(F32, 16).as_pointer())
        return sum_lanes(builder, builder.load(pointer, align=64))

    return types.float32(types.int64), codegen


def _long(builder: Any, address: Value) -> Value:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def _add(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _long(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _load(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_long(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _take(typingctx: Any, counter: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _long(builder, arguments[0]), I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def _call(typingctx: Any, function: Any, argument: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        triple = context.codegen().magic_tuple()[0]
        if triple.startswith(("x86_64", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(function(builder, "llvm.x86.sse2.pause", kind), [])
        elif triple.startswith(("aarch64", "arm64")):
            kind = ir.FunctionType(ir.VoidType(), [I32])
            builder.call(function(builder, "llvm.aarch64.hint", kind), [I32(1)])  # yield
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _float_of(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), codegen


@intrinsic
def _bits_of(typingctx: Any, number: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), codegen


add_lanes: Any = _sum
"""``add_lanes(address)``: the sum of fp32 [16], at a multiple of 64."""
float_of: Any = _float_of
"""``float_of(bits)``: the fp32 that an int32's bits mean."""
bits_of: Any = _bits_of
"""``bits_of(number)``: those of an fp32, as an int32."""
add: Any = _add
"""``add(address, value)``: of an int64, atomically; all threads see all of these and all `load` in one order."""
load: Any = _load
"""``load(address)``: an int64, likewise."""
take: Any = _take
"""``take(counter)``: the next task, which is the value at an address of int64, atomically increased."""
call: Any = _call
"""``call(function, argument)``: a compiled kernel by its address."""
pause: Any = _pause
"""``pause()``: a moment's rest in a loop that waits."""


def function(builder: Any, name: str, kind: Any) -> Value:
    """A function of LLVM's, or of another library, by its name."""
    known = builder.module.globals.get(name)
    return ir.Function(builder.module, kind, name) if known is None else known
