"""Products with weights of 16 bits (bf16), compiled; see `kernels.cpu.compiled` for the form.

A bf16 is the upper half of an fp32, so weights that were stored as bf16 are read in half the bytes, and nothing is
rounded that fp32 weights would not round.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.layout import HALF_PANEL, TILE
from kernels.cpu.words import F32, I16, I32, I64, longs_at, room, stack, sum_lanes, take

_HALVES = ir.VectorType(I16, 16)
_INTS = ir.VectorType(I32, 16)
_FLOATS = ir.VectorType(F32, 16)
_PARTS = HALF_PANEL // 16
TOKENS = 4
"""Tokens for which a weight is widened together."""

_addresses_room = room(8 * TOKENS)


def _product(tokens: int) -> Any:
    """``product(weights, inputs, outputs, panels, rows)``, all int64.

    The products of consecutive output features, bf16 [rows, panels * HALF_PANEL], with `tokens` tokens: `inputs` and
    `outputs` are the addresses of that many addresses, of fp32 [panels * HALF_PANEL] and of fp32 [rows].
    """

    @intrinsic
    def rows(typingctx: Any, weights: Any, inputs: Any, outputs: Any, panels: Any, rows: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, inputs, outputs, panels, rows = arguments

            def at(address: Any, index: Any, size: int, more: int = 0) -> Any:
                return builder.add(builder.add(address, builder.mul(index, I64(size))), I64(more))

            def load(address: Any, kind: Any) -> Any:
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

            sources, targets = (
                [load(at(places, I64(t), 8), I64) for t in range(tokens)] for places in (inputs, outputs)
            )
            parts = _PARTS if tokens <= TOKENS // 2 else 2  # sums that don't wait for each other
            totals = [[stack(builder, _FLOATS) for _ in range(parts)] for _ in range(tokens)]
            with cgutils.for_range(builder, rows, intp=I64) as row:
                for sums in totals:
                    for total in sums:
                        builder.store(ir.Constant(_FLOATS, [0.0] * 16), total)
                start = at(weights, builder.mul(row.index, panels), 2 * HALF_PANEL)
                with cgutils.for_range(builder, panels, intp=I64) as loop:
                    for part in range(_PARTS):
                        half = load(at(start, loop.index, 2 * HALF_PANEL, 32 * part), _HALVES)
                        bits = builder.shl(builder.zext(half, _INTS), ir.Constant(_INTS, [16] * 16))
                        weight = builder.bitcast(bits, _FLOATS)
                        for source, sums in zip(sources, totals, strict=True):
                            x = load(at(source, loop.index, 4 * HALF_PANEL, 64 * part), _FLOATS)
                            total = sums[part % parts]
                            product = builder.fmul(weight, x, flags=("contract",))
                            builder.store(builder.fadd(product, builder.load(total), flags=("contract",)), total)
                for target, sums in zip(targets, totals, strict=True):
                    lanes = builder.load(sums[0])
                    for total in sums[1:]:
                        lanes = builder.fadd(lanes, builder.load(total))
                    result = sum_lanes(builder, lanes)
                    builder.store(result, builder.inttoptr(at(target, row.index, 4), F32.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return rows


_product_1, _product_4 = _product(1), _product(TOKENS)


def halves(version: str, *, cache: bool) -> Any:
    """Rows of fp32 activations times one bf16 matrix; see `kernels.cpu.dense`."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def halves(address: Any) -> None:
        """Counter, tasks, N, K (a multiple of HALF_PANEL), weights bf16 [N, K], tokens, x, bytes from row to row, out
        fp32 [., N]."""
        _ = version
        p = longs_at(address)
        tasks, n, k, tokens = p[1], p[2], p[3], p[5]
        inputs, outputs = _addresses_room(), _addresses_room()
        sources, targets = longs_at(inputs), longs_at(outputs)
        while True:
            task = take(address)
            if task >= tasks:
                break
            first = TILE * task
            rows, weights = min(TILE, n - first), p[4] + 2 * k * first
            for begin in range(0, tokens, TOKENS):
                for i in range(TOKENS):  # the last ones are multiplied again in the place of those that are not there
                    t = min(begin + i, tokens - 1)
                    sources[i], targets[i] = p[6] + p[7] * t, p[8] + 4 * (n * t + first)
                if tokens - begin == 1:
                    _product_1(weights, inputs, outputs, k // HALF_PANEL, rows)
                else:
                    _product_4(weights, inputs, outputs, k // HALF_PANEL, rows)

    return halves
