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

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.emit import (
    BYTES,
    FLOATS,
    HALVES,
    INTS,
    at,
    cpu_features,
    dot2,
    dot4,
    load,
    multiply_add,
    splat,
    store,
)
from kernels.cpu.layout import (
    BASE,
    CHUNK_BYTES,
    CODE_BYTES,
    HIGH,
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
from kernels.cpu.planes import KINDS, codebook, group_scales, planes_of
from kernels.cpu.words import F32, I64, Value, stack, sum_lanes


def native() -> bool:
    """Whether the machine numba compiles for (this one, unless its configuration says otherwise) runs `direct`."""
    return {"+avx512vbmi", "+avx512vnni", "+avx512bw"} <= cpu_features()


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
            shared = [] if own else codebook(builder, kind, tables)
            sources, targets = (
                [load(builder, at(builder, places, 8 * t), I64) for t in range(tokens)] for places in (inputs, outputs)
            )
            totals = [stack(builder, FLOATS) for _ in range(tokens)]
            with cgutils.for_range(builder, rows, intp=I64) as row:
                table = codebook(builder, kind, at(builder, tables, (row.index, TABLE_BYTES))) if own else shared
                for total in totals:
                    builder.store(ir.Constant(FLOATS, [0.0] * 16), total)
                before = builder.mul(row.index, chunks)
                with cgutils.for_range(builder, chunks, intp=I64) as loop:
                    index = builder.add(before, loop.index)
                    planes = planes_of(builder, kind, at(builder, codes, (index, code_bytes)), table)
                    factor = group_scales(builder, at(builder, scales, (index, 2))) if has_scales else None
                    for source, total in zip(sources, totals, strict=True):
                        start = at(builder, source, (loop.index, CHUNK_BYTES))

                        def field(vector: Any, place: int, start: Value = start) -> Value:
                            return load(builder, at(builder, start, place), vector, align=64)

                        low, high = field(INTS, BASE), splat(INTS, 0)
                        for j, plane in enumerate(planes):
                            high = dot4(builder, high, plane, field(BYTES, HIGH + 64 * j))
                            low = dot4(builder, low, plane, field(BYTES, LOW + 64 * j))
                        lanes = builder.add(low, builder.shl(high, splat(INTS, 8)))
                        step = field(FLOATS, STEP)
                        if factor is not None:
                            step = builder.fmul(step, factor)
                        value = builder.sitofp(lanes, FLOATS)
                        builder.store(multiply_add(builder, value, step, builder.load(total)), total)
                factor = load(builder, at(builder, factors, (row.index, 4)), F32)
                for target, total in zip(targets, totals, strict=True):
                    product = builder.fmul(sum_lanes(builder, builder.load(total)), factor)
                    store(builder, product, at(builder, target, (row.index, 4)))
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
            columns = codebook(builder, kind, table)
            offset = splat(HALVES, OFFSETS[index])
            with cgutils.for_range(builder, chunks, intp=I64) as loop:
                planes = planes_of(builder, kind, at(builder, codes, (loop.index, CODE_BYTES[index])), columns)
                target = at(builder, out, (loop.index, WIDE_BYTES))
                for j, plane in enumerate(planes):
                    pairs = builder.bitcast(plane, HALVES)
                    even = builder.sub(builder.and_(pairs, splat(HALVES, 255)), offset)
                    odd = builder.sub(builder.lshr(pairs, splat(HALVES, 8)), offset)
                    store(builder, even, at(builder, target, 128 * j), align=64)
                    store(builder, odd, at(builder, target, 128 * j + 64), align=64)
                if kind in ("ccq", "line"):
                    lanes = group_scales(builder, at(builder, scales, (loop.index, 2)))
                    store(builder, lanes, at(builder, steps, (loop.index, 64)), align=64)
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
            features = cpu_features()
            sources = [load(builder, at(builder, inputs, 8 * t), I64) for t in range(PAIR)]
            places = {
                (r, t): at(builder, sums, 64 * (TILE * t + r)) for r in range(ROWS) for t in range(PAIR)
            }  # fmt: skip
            totals = {key: stack(builder, FLOATS) for key in places}
            for key, place in places.items():
                builder.store(load(builder, place, FLOATS, align=64), totals[key])
            with cgutils.for_range(builder, chunks, intp=I64) as loop:
                lanes = dict.fromkeys(places, splat(INTS, 0))
                starts = [at(builder, source, (loop.index, CHUNK_BYTES)) for source in sources]
                for v in range(8):
                    rows = [
                        load(
                            builder,
                            at(builder, weights, (loop.index, WIDE_BYTES), r * SPAN * WIDE_BYTES + 64 * v),
                            HALVES,
                            align=64,
                        )
                        for r in range(ROWS)
                    ]
                    for t, start in enumerate(starts):
                        values = load(builder, at(builder, start, WIDE + 64 * v), HALVES, align=64)
                        for r, row in enumerate(rows):
                            lanes[r, t] = dot2(builder, lanes[r, t], row, values, features)
                scales = [
                    load(builder, at(builder, steps, (loop.index, 64), r * SPAN * 64), FLOATS, align=64)
                    for r in range(ROWS if scaled else 0)
                ]
                for t, start in enumerate(starts):
                    step = load(builder, at(builder, start, STEP), FLOATS, align=64)
                    for r in range(ROWS):
                        factor = builder.fmul(step, scales[r]) if scaled else step
                        value = builder.sitofp(lanes[r, t], FLOATS)
                        total = totals[r, t]
                        builder.store(multiply_add(builder, value, factor, builder.load(total)), total)
            for key, place in places.items():
                store(builder, builder.load(totals[key]), place, align=64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return multiply
