"""The loops over packed weights, compiled for the machine they run on.

Why numba: packed bytes need integer arithmetic that torch has no operation for, and whoever installs Dibit may have no
compiler. numba brings LLVM as a wheel, which vectorises for the CPU that is there; its cache on disk (beside this file
or, where that can't be written, in the user's cache folder) makes compiling a matter of the first run.

Every kernel is a C function of one address, that of an array of int64: first a counter of tasks, then its arguments
(`kernels.cpu.product` fills it in). However many threads call it, each takes the next task until there are none:
`kernels.cpu.threads` calls it from torch's own pool of threads, so that the two don't fight for the cores.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from kernels.cpu import layout, vector
from kernels.cpu.layout import BASE, BLOCK, CHUNK, CHUNK_BYTES, HIGH, LOW, STEP, TABLE_BYTES, TILE, TOKENS
from kernels.cpu.vector import (
    DOTS,
    address_room,
    bytes_at,
    chunk_room,
    floats_at,
    halves_at,
    ints_at,
    longs_at,
    native,
    signed_at,
    sums_room,
    tables_room,
    take,
)

logger = logging.getLogger(__name__)

NATIVE = native()
LARGEST = np.float32(32512.0)
"""The largest activation's integer: 127 * 256, so that rounding to ``256 high + low`` can't carry out of a byte."""
MAGIC = np.float32(1.5 * 2**23)
"""Adding it to a float of less than 2^22 leaves no bits for a fraction: rounds to nearest, ties to even."""
TINY = np.float32(1e-30)
"""Groups of nothing larger count as zeros: `LARGEST` divided by less may not be finite."""
HALF, ZERO = np.float32(0.5), np.float32(0.0)

_ccq1, _ccq2, _ccq4 = (DOTS["ccq", tokens] for tokens in (1, 2, TOKENS))
_int4_1, _int4_2, _int4_4 = (DOTS["int4", tokens] for tokens in (1, 2, TOKENS))
_int8_1, _int8_2, _int8_4 = (DOTS["int8", tokens] for tokens in (1, 2, TOKENS))


@njit
def _fill(table: Any, scale: Any, zero: Any) -> None:
    """A column's codebook [4, 256], by the reference's arithmetic: each operation rounds by itself."""
    entries = bytes_at(table)
    for u in range(256):
        word = np.int32(np.floor(np.float32(u) * scale + zero + HALF))
        for j in range(4):
            entries[256 * j + u] = np.uint8((word >> (9 - 3 * j)) & 63)


@njit
def _unpack(kind: Any, codes: Any, table: Any, room: Any) -> None:
    """A chunk's four planes of 64 unsigned bytes."""
    source, target, entries = bytes_at(codes), bytes_at(room), bytes_at(table)
    if kind == 0:
        for r in range(64):
            u = np.int64(source[r])
            for j in range(4):
                target[64 * j + r] = entries[256 * j + u]
    elif kind == 1:
        for half in range(2):
            for r in range(64):
                byte = source[64 * half + r]
                target[128 * half + r] = byte & np.uint8(15)
                target[128 * half + 64 + r] = byte >> np.uint8(4)
    else:
        for i in range(256):
            target[i] = source[i]


@njit
def _nibble(scales: Any, group: Any) -> Any:
    """Scale of a group; an even one is the high half of its byte."""
    byte = np.int64(bytes_at(scales)[group >> 1])
    return (byte & 15) if group & 1 else (byte >> 4)


@njit
def _dot_plain(
    kind: Any, tokens: Any, codes: Any, scales: Any, table: Any, inputs: Any, chunks: Any, sums: Any
) -> None:
    """`vector.DOTS` in loops that LLVM vectorises for whatever there is; activations are int16."""
    room = chunk_room()
    planes, rows, totals = bytes_at(room), longs_at(inputs), floats_at(sums)
    code_bytes = 64 << kind
    for c in range(chunks):
        _unpack(kind, codes + code_bytes * c, table, room)
        for t in range(tokens):
            start = rows[t] + CHUNK_BYTES * c
            values, bases, steps = halves_at(start), ints_at(start + BASE), floats_at(start + STEP)
            for g in range(4):
                total = bases[4 * g] + bases[4 * g + 1] + bases[4 * g + 2] + bases[4 * g + 3]
                for j in range(4):
                    first = 64 * j + 16 * g
                    part = np.int32(0)
                    for r in range(16):
                        part += np.int32(planes[first + r]) * np.int32(values[first + r])
                    total += part
                step = steps[4 * g]
                if kind == 0:
                    step *= np.float32(_nibble(scales, 4 * c + g))
                totals[16 * t] += np.float32(total) * step


@njit
def _dot_native(
    kind: Any, tokens: Any, codes: Any, scales: Any, table: Any, inputs: Any, chunks: Any, sums: Any
) -> None:
    if kind == 0:
        if tokens == 1:
            _ccq1(codes, scales, table, inputs, chunks, sums)
        elif tokens == 2:
            _ccq2(codes, scales, table, inputs, chunks, sums)
        else:
            _ccq4(codes, scales, table, inputs, chunks, sums)
    elif kind == 1:
        if tokens == 1:
            _int4_1(codes, scales, table, inputs, chunks, sums)
        elif tokens == 2:
            _int4_2(codes, scales, table, inputs, chunks, sums)
        else:
            _int4_4(codes, scales, table, inputs, chunks, sums)
    else:
        if tokens == 1:
            _int8_1(codes, scales, table, inputs, chunks, sums)
        elif tokens == 2:
            _int8_2(codes, scales, table, inputs, chunks, sums)
        else:
            _int8_4(codes, scales, table, inputs, chunks, sums)


_dot = _dot_native if NATIVE else _dot_plain


@njit
def _sum(sums: Any, first: Any) -> Any:
    """Sixteen lanes, added in halves: in this order in every product."""
    width = 8
    while width:
        for i in range(width):
            sums[first + i] += sums[first + width + i]
        width >>= 1
    return sums[first]


@njit
def _quantize_group(source: Any, count: Any, target: Any) -> Any:
    """`count` fp32 at `source` as int32 [64] at `target`, zeros after them; returns their step."""
    bits, values, integers = ints_at(source), floats_at(source), ints_at(target)
    top = np.int32(0)
    for k in range(count):  # the order of magnitudes is that of their bits, and integers vectorise; NaN is on top
        top = max(top, bits[k] & np.int32(0x7FFFFFFF))
    ints_at(target)[0] = top
    largest = floats_at(target)[0]
    for k in range(64):
        integers[k] = np.int32(0)
    if TINY < largest < np.inf:  # else zeros times the step: nothing, or NaN for a NaN or an infinity
        inverse = LARGEST / largest
        for k in range(count):
            integers[k] = np.int32((values[k] * inverse + MAGIC) - MAGIC)
    return largest / LARGEST


@njit
def _quantize_chunk(source: Any, count: Any, target: Any, order: Any, offset: Any, wide: Any) -> None:
    """`count` of a chunk's activations in the layout of `kernels.cpu.vector`."""
    room = chunk_room()
    integers, positions = ints_at(room), ints_at(order)
    high, low, halves = signed_at(target + HIGH), signed_at(target + LOW), halves_at(target)
    bases, steps = ints_at(target + BASE), floats_at(target + STEP)
    for g in range(4):
        left = min(64, max(0, count - 64 * g))
        step = _quantize_group(source + 256 * g, left, room + 256 * g)
        for i in range(4):
            steps[4 * g + i] = step
    for lane in range(16):
        bases[lane] = np.int32(0)
    for j in range(4):
        for r in range(64):
            value = integers[positions[64 * j + r]]
            if wide:
                halves[64 * j + r] = np.int16(value)
            else:
                below = ((value + np.int32(128)) & np.int32(255)) - np.int32(128)
                low[64 * j + r] = np.int8(below)
                high[64 * j + r] = np.int8((value - below) >> np.int32(8))
        for lane in range(16):
            total = np.int32(0)
            for r in range(4):
                total += integers[positions[64 * j + 4 * lane + r]]
            bases[lane] -= total * np.int32(offset)


def _compile(version: str) -> dict[str, Any]:
    """The kernels; `version` in their closure makes it part of the key of numba's cache, which otherwise looks only at
    this file's age and would miss a change of the modules it is made from."""

    @cfunc(types.void(types.int64), cache=True)
    def quantize(address: Any) -> None:
        """Counter, tokens, K, x fp32, bytes from row to row, out, order, offset."""
        _ = version
        p = longs_at(address)
        tokens, k, order, offset = p[1], p[2], p[6], p[7]
        chunks = (k + CHUNK - 1) // CHUNK
        while True:
            t = take(address)
            if t >= tokens:
                break
            for c in range(chunks):
                source, target = p[3] + p[4] * t + 4 * CHUNK * c, p[5] + CHUNK_BYTES * (chunks * t + c)
                _quantize_chunk(source, min(CHUNK, k - CHUNK * c), target, order, offset, not NATIVE)

    @cfunc(types.void(types.int64), cache=True)
    def product(address: Any) -> None:
        """Counter, tasks, kind, N, chunks, codes, scales, tables or 0, factor, code scale, code zero, segments
        (matrix, first entry, entries), entries (row of x, row of out), x, out fp32 [., N]."""
        _ = version
        p = longs_at(address)
        tasks, kind, n, chunks = p[1], p[2], p[3], p[4]
        segments, entries = longs_at(p[11]), longs_at(p[12])
        tiles = (n + TILE - 1) // TILE
        code_bytes, scale_bytes, row_bytes = (64 << kind) * chunks, 2 * chunks, CHUNK_BYTES * chunks
        tables, inputs, results = tables_room(), address_room(), sums_room()
        sources, sums = longs_at(inputs), floats_at(results)
        factors, code_scales, code_zeros, out = floats_at(p[8]), floats_at(p[9]), floats_at(p[10]), floats_at(p[14])
        own = p[7] == 0 and kind == 0
        while True:
            task = take(address)
            if task >= tasks:
                break
            segment, first_row = 3 * (task // tiles), TILE * (task % tiles)
            first, count = segments[segment + 1], segments[segment + 2]
            rows, column = min(TILE, n - first_row), segments[segment] * n + first_row
            if own:
                for i in range(rows):
                    _fill(tables + TABLE_BYTES * i, code_scales[column + i], code_zeros[column + i])
            done = 0
            while done < count:
                step = TOKENS if count - done >= TOKENS else (2 if count - done >= 2 else 1)
                for i in range(TILE * TOKENS * 16):
                    sums[i] = ZERO
                span = chunks if step == 1 else BLOCK // step
                for c in range(0, chunks, span):
                    for t in range(step):
                        sources[t] = p[13] + row_bytes * entries[2 * (first + done + t)] + CHUNK_BYTES * c
                    for i in range(rows):
                        codes = p[5] + code_bytes * (column + i) + (64 << kind) * c
                        scales = p[6] + scale_bytes * (column + i) + 2 * c
                        table = tables + TABLE_BYTES * i if own else p[7] + TABLE_BYTES * segments[segment]
                        _dot(kind, step, codes, scales, table, inputs, min(span, chunks - c), results + 64 * TOKENS * i)
                for t in range(step):
                    target = n * entries[2 * (first + done + t) + 1] + first_row
                    for i in range(rows):
                        out[target + i] = _sum(sums, 16 * (TOKENS * i + t)) * factors[column + i]
                done += step

    @cfunc(types.void(types.int64), cache=True)
    def decode(address: Any) -> None:
        """Counter, rows, kind, first row, chunks, codes, scales, table or 0, factor, code scale, code zero, order,
        offset, K, out fp32 [rows, K]."""
        _ = version
        p = longs_at(address)
        rows, kind, chunks, offset, k = p[1], p[2], p[4], p[12], p[13]
        order, factors, code_scales, code_zeros = ints_at(p[11]), floats_at(p[8]), floats_at(p[9]), floats_at(p[10])
        room, own_table = chunk_room(), tables_room()
        planes = bytes_at(room)
        while True:
            row = take(address)
            if row >= rows:
                break
            column = p[3] + row
            table = p[7]
            if table == 0 and kind == 0:
                table = own_table
                _fill(table, code_scales[column], code_zeros[column])
            out = floats_at(p[14] + 4 * k * row)
            for c in range(chunks):
                _unpack(kind, p[5] + (64 << kind) * (chunks * column + c), table, room)
                for i in range(CHUNK):
                    feature = CHUNK * c + np.int64(order[i])
                    if feature < k:
                        value = np.int64(planes[i]) - offset
                        if kind == 0:
                            value *= _nibble(p[6] + 2 * chunks * column, feature >> 6)
                        out[feature] = np.float32(value) * factors[column]

    return {"quantize": quantize, "product": product, "decode": decode}


@cache
def addresses() -> dict[str, int]:
    """Where each kernel is, compiled once for a machine."""
    logger.info(
        "kernels for packed weights: read from numba's cache, or compiled (once, some seconds), for %s",
        "AVX-512 with VNNI and VBMI" if NATIVE else "plain vector instructions",
    )
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in (layout, vector))
    return {name: kernel.address for name, kernel in _compile(hashlib.sha256(source).hexdigest()).items()}
