"""Products of packed weights in vector instructions: what LLVM does not find by itself, as intrinsics of numba.

The unit is a chunk of 256 input features of one output feature. Decoded, it is four planes of 64 unsigned bytes; plane
j holds the features 4r + j of the chunk, because a CCQ byte r holds those four, one in each of its windows. The bytes
are small integers with an offset (window + 32, nibble + 8, value + 128).

Activations are 16-bit integers, 32512 for the largest of a group of 64 features: an activation errs by 2^-16 of its
group's largest, so that nothing has to be said about what int8 activations do to a model. A token's chunk of
activations takes `CHUNK_BYTES`, and has them twice:

    0    256 high bytes, four planes: an activation is ``256 high + low``, both signed
    256  256 low bytes
    512  int32 [16], minus the offset times the sum of the activations in a lane
    576  fp32 [16], a lane's step
    640  int16 [256], of each plane first the 32 with even places, then those with odd ones

With `LINE`, plane 2h + p holds of every sixteen bytes' eights h, for each four of them, the windows 2p and 2p + 1.

Lane i of 16 holds places 4i ... 4i + 3 of all planes, so lanes 4g ... 4g + 3 are the g-th group of 64 features, and a
group's scale is one more factor of its lanes. Two ways lead to the same integers in the same lanes, and so to the same
sums to the bit:

* `direct`, for a token or two: codes are decoded into registers and multiplied as they are, byte by byte (`vpdpbusd`,
  four products in a lane, once with the high and once with the low bytes), which costs less than widening every decoded
  weight to 16 bits. Needs AVX-512 with VNNI, and VBMI for the tables: 64 bytes of CCQ then cost 12 instructions (8
  look-ups, 4 blends) and no arithmetic at all, against about 60 for computing the words.
* `unpack`, then `tile`, for more tokens: weights are widened and written to memory once, in the order of the 16-bit
  activations, and the sums of some output features with some tokens stay in registers (`vpdpwssd`, or `pmaddwd` and an
  addition, or whatever LLVM has elsewhere). `tile` runs on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kernels.cpu.layout import (
    BASE,
    CHUNK_BYTES,
    CODE_BYTES,
    HIGH,
    LINE_AT,
    LOW,
    OFFSETS,
    PAIR,
    ROWS,
    SPAN,
    STEP,
    TABLE_BYTES,
    TILE,
    WIDE,
    WIDE_BYTES,
)
from kernels.cpu.words import F32, I8, I16, I32, I64, Value, function, stack, sum_lanes

_BYTES = ir.VectorType(I8, 64)
_HALVES = ir.VectorType(I16, 32)
_INTS = ir.VectorType(I32, 16)
_FLOATS = ir.VectorType(F32, 16)

KINDS = ("ccq", "int4", "int8", "line")
"""Names of `kernels.cpu.layout`'s kinds."""


def _features() -> set[str]:
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return set(features.split(","))


def native() -> bool:
    """Whether the machine numba compiles for (this one, unless its configuration says otherwise) runs `direct`."""
    return {"+avx512vbmi", "+avx512vnni", "+avx512bw"} <= _features()


# Emitters of one step each.


def _constant(vector: Any, values: Sequence[int]) -> Value:
    return ir.Constant(vector, list(values))


def _splat(vector: Any, value: int) -> Value:
    return _constant(vector, [value] * vector.count)


def _load(builder: Any, address: Value, vector: Any, *, align: int = 1) -> Value:
    pointer = builder.inttoptr(address, vector.as_pointer())
    return builder.load(pointer, align=align)


def _store(builder: Any, value: Value, address: Value, *, align: int = 1) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _call(builder: Any, name: str, result: Any, arguments: Sequence[Value]) -> Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(function(builder, name, kind), arguments)


def _at(builder: Any, address: Value, *terms: tuple[Value, int] | int) -> Value:
    """``address`` plus numbers and (index, bytes) products."""
    for term in terms:
        offset = I64(term) if isinstance(term, int) else builder.mul(term[0], I64(term[1]))
        address = builder.add(address, offset)
    return address


def _dot4(builder: Any, total: Value, unsigned: Value, signed: Value) -> Value:
    """Lane += four products of an unsigned with a signed byte."""
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, (total, unsigned, signed))


def _dot2(builder: Any, total: Value, first: Value, second: Value, features: set[str]) -> Value:
    """Lane += two products of 16-bit integers."""
    if "+avx512bw" in features:  # with VNNI, LLVM makes one instruction of it
        pairs = _call(builder, "llvm.x86.avx512.pmaddw.d.512", _INTS, (first, second))
        return builder.add(total, pairs)
    if "+avx2" in features:
        parts = []
        for half in (range(16), range(16, 32)):
            picked = [builder.shuffle_vector(v, v, _constant(ir.VectorType(I32, 16), half)) for v in (first, second)]
            parts.append(_call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), picked))
        return builder.add(total, builder.shuffle_vector(*parts, _constant(_INTS, range(16))))
    wide = ir.VectorType(I32, 32)
    products = builder.mul(builder.sext(first, wide), builder.sext(second, wide))
    even, odd = (builder.shuffle_vector(products, products, _constant(_INTS, range(o, 32, 2))) for o in (0, 1))
    return builder.add(total, builder.add(even, odd))


def _look_up(builder: Any, table: Sequence[Value], codes: Value, upper: Value) -> Value:
    """Bytes of a table of 256 in four registers: two look-ups of 128, and the code's top bit chooses."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    first = _call(builder, name, _BYTES, (table[0], codes, table[1]))
    second = _call(builder, name, _BYTES, (table[2], codes, table[3]))
    return builder.select(upper, second, first)


def _table(builder: Any, address: Value) -> list[list[Value]]:
    return [
        [_load(builder, _at(builder, address, 256 * j + 64 * i), _BYTES) for i in range(4)] for j in range(4)
    ]  # fmt: skip


def _line(builder: Any, table: Value) -> list[Value]:
    """a and b of `LINE`, each in all lanes."""
    numbers = []
    for i in range(2):
        number = _load(builder, _at(builder, table, LINE_AT + 2 * i), I16)
        lanes = builder.insert_element(ir.Constant(_HALVES, ir.Undefined), number, I32(0))
        numbers.append(builder.shuffle_vector(lanes, lanes, _splat(ir.VectorType(I32, 32), 0)))
    return numbers


def _line_planes(builder: Any, codes: Value, line: Sequence[Value]) -> list[Value]:
    """Words of 32 codes at a time, of each eight neighbours' first or second four, and of those two windows."""
    block, zeros = _load(builder, codes, _BYTES), _splat(_BYTES, 0)
    planes = []
    for half in range(2):
        # Every other of these bytes is one of `zeros`: unpacking within 128 bits is one instruction.
        places = [16 * (i // 16) + 8 * half + i % 16 // 2 + 64 * (i % 2) for i in range(64)]
        wide = builder.shuffle_vector(block, zeros, _constant(ir.VectorType(I32, 64), places))
        products = builder.add(builder.mul(builder.bitcast(wide, _HALVES), line[0]), line[1])
        words = builder.bitcast(builder.lshr(products, _splat(_HALVES, 1)), _BYTES)
        for pair in range(2):
            starts = [16 * (i % 4) + 9 - 3 * (2 * pair + i % 8 // 4) for i in range(64)]
            control = _constant(_BYTES, starts)
            shifted = _call(builder, "llvm.x86.avx512.pmultishift.qb.512", _BYTES, (control, words))
            planes.append(builder.and_(shifted, _splat(_BYTES, 63)))
    return planes


def _codebook(builder: Any, kind: str, table: Value) -> list[Any]:
    if kind == "line":
        return _line(builder, table)
    return _table(builder, table) if kind == "ccq" else []


def _planes(builder: Any, kind: str, codes: Value, table: Sequence[Any]) -> list[Value]:
    """The four planes of the chunk at `codes`, unsigned."""
    if kind == "line":
        return _line_planes(builder, codes, table)
    if kind == "ccq":
        block = _load(builder, codes, _BYTES)
        upper = builder.icmp_signed("<", block, _splat(_BYTES, 0))
        return [_look_up(builder, plane, block, upper) for plane in table]
    if kind == "int8":
        return [_load(builder, _at(builder, codes, 64 * j), _BYTES) for j in range(4)]
    planes = []
    for half in range(2):
        block = _load(builder, _at(builder, codes, 64 * half), _BYTES)
        shifted = builder.bitcast(builder.lshr(builder.bitcast(block, _HALVES), _splat(_HALVES, 4)), _BYTES)
        planes += [builder.and_(block, _splat(_BYTES, 15)), builder.and_(shifted, _splat(_BYTES, 15))]
    return planes


def _group_scales(builder: Any, address: Value) -> Value:
    """Four nibbles, the even group's in the high half of its byte, each in the lanes of its group."""
    pair = builder.zext(_load(builder, address, I16), I32)
    lanes = builder.insert_element(ir.Constant(_INTS, ir.Undefined), pair, I32(0))
    lanes = builder.shuffle_vector(lanes, lanes, _splat(_INTS, 0))
    shifts = _constant(_INTS, [shift for shift in (4, 0, 12, 8) for _ in range(4)])
    return builder.sitofp(builder.and_(builder.lshr(lanes, shifts), _splat(_INTS, 15)), _FLOATS)


def _multiply_add(builder: Any, value: Value, factor: Value, total: Value) -> Value:
    """Rounded once where the machine can."""
    return builder.fadd(builder.fmul(value, factor, flags=("contract",)), total, flags=("contract",))


def direct(kind: str, tokens: int, *, own: bool) -> Callable[..., Any]:
    """``direct(codes, scales, tables, factors, inputs, outputs, chunks, rows)``, all int64.

    The products of consecutive output features with `tokens` tokens, written to `outputs`: that many addresses of fp32
    [rows]. `codes`, `scales` (of "ccq") and `factors` are addresses of the first feature; `tables` that of one codebook
    or, with `own`, of one for each feature; `inputs` that of `tokens` addresses of activations.
    """
    code_bytes = CODE_BYTES[KINDS.index(kind)]
    has_scales = kind in ("ccq", "line")

    @intrinsic
    def rows(
        typingctx: Any,
        codes: Any,
        scales: Any,
        tables: Any,
        factors: Any,
        inputs: Any,
        outputs: Any,
        chunks: Any,
        rows: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, scales, tables, factors, inputs, outputs, chunks, rows = arguments
            shared = [] if own else _codebook(builder, kind, tables)
            sources, targets = (
                [_load(builder, _at(builder, places, 8 * t), I64) for t in range(tokens)]
                for places in (inputs, outputs)
            )
            totals = [stack(builder, _FLOATS) for _ in range(tokens)]
            with cgutils.for_range(builder, rows, intp=I64) as row:
                table = _codebook(builder, kind, _at(builder, tables, (row.index, TABLE_BYTES))) if own else shared
                for total in totals:
                    builder.store(ir.Constant(_FLOATS, [0.0] * 16), total)
                before = builder.mul(row.index, chunks)
                with cgutils.for_range(builder, chunks, intp=I64) as loop:
                    index = builder.add(before, loop.index)
                    planes = _planes(builder, kind, _at(builder, codes, (index, code_bytes)), table)
                    factor = _group_scales(builder, _at(builder, scales, (index, 2))) if has_scales else None
                    for source, total in zip(sources, totals, strict=True):
                        start = _at(builder, source, (loop.index, CHUNK_BYTES))

                        def field(vector: Any, at: int, start: Value = start) -> Value:
                            return _load(builder, _at(builder, start, at), vector, align=64)

                        low, high = field(_INTS, BASE), _splat(_INTS, 0)
                        for j, plane in enumerate(planes):
                            high = _dot4(builder, high, plane, field(_BYTES, HIGH + 64 * j))
                            low = _dot4(builder, low, plane, field(_BYTES, LOW + 64 * j))
                        lanes = builder.add(low, builder.shl(high, _splat(_INTS, 8)))
                        step = field(_FLOATS, STEP)
                        if factor is not None:
                            step = builder.fmul(step, factor)
                        value = builder.sitofp(lanes, _FLOATS)
                        builder.store(_multiply_add(builder, value, step, builder.load(total)), total)
                factor = _load(builder, _at(builder, factors, (row.index, 4)), F32)
                for target, total in zip(targets, totals, strict=True):
                    product = builder.fmul(sum_lanes(builder, builder.load(total)), factor)
                    _store(builder, product, _at(builder, target, (row.index, 4)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return rows


def unpack(kind: str) -> Callable[..., Any]:
    """``unpack(codes, scales, table, out, steps, chunks)``, all int64: chunks of one output feature.

    `out` is the address of int16 [chunks, 256], weights without their offset in the order of 16-bit activations;
    `steps`, of "ccq", that of fp32 [chunks, 16], the scales of the lanes.
    """
    index = KINDS.index(kind)

    @intrinsic
    def widen(typingctx: Any, codes: Any, scales: Any, table: Any, out: Any, steps: Any, chunks: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, scales, table, out, steps, chunks = arguments
            columns = _codebook(builder, kind, table)
            offset = _splat(_HALVES, OFFSETS[index])
            with cgutils.for_range(builder, chunks, intp=I64) as loop:
                planes = _planes(builder, kind, _at(builder, codes, (loop.index, CODE_BYTES[index])), columns)
                target = _at(builder, out, (loop.index, WIDE_BYTES))
                for j, plane in enumerate(planes):
                    pairs = builder.bitcast(plane, _HALVES)
                    even = builder.sub(builder.and_(pairs, _splat(_HALVES, 255)), offset)
                    odd = builder.sub(builder.lshr(pairs, _splat(_HALVES, 8)), offset)
                    _store(builder, even, _at(builder, target, 128 * j), align=64)
                    _store(builder, odd, _at(builder, target, 128 * j + 64), align=64)
                if kind in ("ccq", "line"):
                    lanes = _group_scales(builder, _at(builder, scales, (loop.index, 2)))
                    _store(builder, lanes, _at(builder, steps, (loop.index, 64)), align=64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return widen


def tile(*, scaled: bool) -> Callable[..., Any]:
    """``tile(weights, steps, inputs, chunks, sums)``, all int64.

    Adds the products of `ROWS` output features with `PAIR` tokens, over up to `SPAN` chunks, to `sums`: the address of
    fp32 [PAIR, TILE, 16], lanes whose sum is the product. `weights` and `steps` are addresses of what `unpack` wrote,
    [ROWS, SPAN, ...], `inputs` that of `PAIR` addresses of activations.
    """

    @intrinsic
    def multiply(typingctx: Any, weights: Any, steps: Any, inputs: Any, chunks: Any, sums: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, steps, inputs, chunks, sums = arguments
            features = _features()
            sources = [_load(builder, _at(builder, inputs, 8 * t), I64) for t in range(PAIR)]
            places = {
                (r, t): _at(builder, sums, 64 * (TILE * t + r)) for r in range(ROWS) for t in range(PAIR)
            }  # fmt: skip
            totals = {key: stack(builder, _FLOATS) for key in places}
            for key, place in places.items():
                builder.store(_load(builder, place, _FLOATS, align=64), totals[key])
            with cgutils.for_range(builder, chunks, intp=I64) as loop:
                lanes = dict.fromkeys(places, _splat(_INTS, 0))
                starts = [_at(builder, source, (loop.index, CHUNK_BYTES)) for source in sources]
                for v in range(8):
                    rows = [
                        _load(
                            builder,
                            _at(builder, weights, (loop.index, WIDE_BYTES), r * SPAN * WIDE_BYTES + 64 * v),
                            _HALVES,
                            align=64,
                        )
                        for r in range(ROWS)
                    ]
                    for t, start in enumerate(starts):
                        values = _load(builder, _at(builder, start, WIDE + 64 * v), _HALVES, align=64)
                        for r, row in enumerate(rows):
                            lanes[r, t] = _dot2(builder, lanes[r, t], row, values, features)
                scales = [
                    _load(builder, _at(builder, steps, (loop.index, 64), r * SPAN * 64), _FLOATS, align=64)
                    for r in range(ROWS if scaled else 0)
                ]
                for t, start in enumerate(starts):
                    step = _load(builder, _at(builder, start, STEP), _FLOATS, align=64)
                    for r in range(ROWS):
                        factor = builder.fmul(step, scales[r]) if scaled else step
                        value = builder.sitofp(lanes[r, t], _FLOATS)
                        total = totals[r, t]
                        builder.store(_multiply_add(builder, value, factor, builder.load(total)), total)
            for key, place in places.items():
                _store(builder, builder.load(totals[key]), place, align=64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return multiply
