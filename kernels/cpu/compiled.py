"""The loops over packed weights, compiled for the machine they run on.

Why numba: packed bytes need integer arithmetic that torch has no operation for, and whoever installs Dibit may have no
compiler. numba brings LLVM as a wheel, which vectorises for the CPU that is there; its cache on disk (beside this file
or, where that can't be written, in the user's cache folder) makes compiling a matter of the first run.

Every kernel is a C function of one address, that of an array of int64: first a counter of tasks, then its arguments
(the modules that call them fill it in). However many threads call it, each takes the next task until there are none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, types

from kernels.cpu.activations import quantize_chunk
from kernels.cpu.arithmetic import ZERO, silu
from kernels.cpu.chunks import MOST_DIRECT, NATIVE, add_tile, fill_table, multiply, nibble, read_planes, unpack
from kernels.cpu.layout import CHUNK, CHUNK_BYTES, PAIR, PASS, ROWS, SPAN, TABLE_BYTES, TILE, WIDE_BYTES
from kernels.cpu.words import add_lanes, bytes_at, floats_at, ints_at, longs_at, room, take

_chunk_room = room(4 * CHUNK)
_tables_room = room(TILE * TABLE_BYTES)
_planes_room = room(TILE * SPAN * WIDE_BYTES)
_steps_room = room(TILE * SPAN * 64)
_sums_room = room(PASS * TILE * 64)
_addresses_room = room(8 * PAIR)
_outputs_room = room(8 * PAIR)


def quantize(version: str, *, cache: bool) -> Any:
    """Rows of activations; see `kernels.cpu.product`."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def quantize(address: Any) -> None:
        """Counter, tokens, K, x fp32, bytes from row to row, out, order, offset, gated: whether a row has K gates and
        then K values, and silu(gate) value is wanted."""
        _ = version
        p = longs_at(address)
        tokens, k, order, offset, gated = p[1], p[2], p[6], p[7], p[8]
        chunks = (k + CHUNK - 1) // CHUNK
        place = _chunk_room()
        products = floats_at(place)
        while True:
            t = take(address)
            if t >= tokens:
                break
            for c in range(chunks):
                source, target = p[3] + p[4] * t + 4 * CHUNK * c, p[5] + CHUNK_BYTES * (chunks * t + c)
                count = min(CHUNK, k - CHUNK * c)
                if gated:
                    gates, values = floats_at(source), floats_at(source + 4 * k)
                    for i in range(count):
                        products[i] = silu(gates[i]) * values[i]
                    source = place
                quantize_chunk(source, count, target, order, offset, NATIVE)

    return quantize


def product(version: str, *, cache: bool) -> Any:
    """Rows of activations times matrices of a stack; see `kernels.cpu.product`."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def product(address: Any) -> None:
        """Counter, number of segments at an address, kind, N, chunks, codes, scales, tables or 0, factor, code scale,
        code zero, segments (matrix, first entry, entries), entries (row of x, row of out), x, out fp32 [., N],
        offset, tasks to take at a time."""
        _ = version
        p = longs_at(address)
        kind, n, chunks, offset = p[2], p[3], p[4], p[15]
        segments, entries = longs_at(p[11]), longs_at(p[12])
        tiles = (n + TILE - 1) // TILE
        tasks = longs_at(p[1])[0] * tiles
        code_bytes, scale_bytes, row_bytes = (64 << kind % 3) * chunks, 2 * chunks, CHUNK_BYTES * chunks
        tables, inputs, outputs = _tables_room(), _addresses_room(), _outputs_room()
        planes, steps, results = _planes_room(), _steps_room(), _sums_room()
        sources, targets, sums = longs_at(inputs), longs_at(outputs), floats_at(results)
        factors, code_scales, code_zeros, out = floats_at(p[8]), floats_at(p[9]), floats_at(p[10]), floats_at(p[14])
        own = p[7] == 0 and kind == 0
        table_bytes = TABLE_BYTES if own else 0
        grain = p[16]
        task, end = 0, 0
        while True:
            task += 1
            if task >= end:
                task = grain * take(address)
                end = min(task + grain, tasks)
            if task >= tasks:
                break
            segment, first_row = 3 * (task // tiles), TILE * (task % tiles)
            first, count = segments[segment + 1], segments[segment + 2]
            rows, column = min(TILE, n - first_row), segments[segment] * n + first_row
            if own:
                for i in range(rows):
                    fill_table(tables + TABLE_BYTES * i, code_scales[column + i], code_zeros[column + i])
            table = tables if own else p[7] + TABLE_BYTES * segments[segment]
            codes, scales = p[5] + code_bytes * column, p[6] + scale_bytes * column
            if count <= MOST_DIRECT:
                for t in range(count):
                    entry = 2 * (first + t)
                    sources[t] = p[13] + row_bytes * entries[entry]
                    targets[t] = p[14] + 4 * (n * entries[entry + 1] + first_row)
                multiply(
                    kind, own, count, codes, scales, table, p[8] + 4 * column, inputs, outputs, chunks, rows
                )  # fmt: skip
                continue
            for begin in range(0, count, PASS):
                tokens = min(PASS, count - begin)
                for i in range(tokens * TILE * 16):
                    sums[i] = ZERO
                for c in range(0, chunks, SPAN):
                    span = min(SPAN, chunks - c)
                    for i in range(rows):
                        unpack(
                            kind,
                            codes + code_bytes * i + (64 << kind % 3) * c,
                            scales + scale_bytes * i + 2 * c,
                            table + table_bytes * i,
                            planes + SPAN * WIDE_BYTES * i,
                            steps + SPAN * 64 * i,
                            span,
                            offset,
                        )
                    for t in range(0, tokens, PAIR):
                        for i in range(PAIR):  # a last one alone is multiplied twice
                            entry = 2 * (first + begin + min(t + i, tokens - 1))
                            sources[i] = p[13] + row_bytes * entries[entry] + CHUNK_BYTES * c
                        for i in range(0, rows, ROWS):
                            add_tile(
                                kind,
                                planes + SPAN * WIDE_BYTES * i,
                                steps + SPAN * 64 * i,
                                inputs,
                                span,
                                results + 64 * (TILE * t + i),
                            )
                for t in range(tokens):
                    target = n * entries[2 * (first + begin + t) + 1] + first_row
                    for i in range(rows):
                        out[target + i] = add_lanes(results + 64 * (TILE * t + i)) * factors[column + i]

    return product


def decode(version: str, *, cache: bool) -> Any:
    """Some output features of a matrix, as fp32; see `kernels.cpu.product`."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def decode(address: Any) -> None:
        """Counter, rows, kind, first row, chunks, codes, scales, table or 0, factor, code scale, code zero, order,
        offset, K, out fp32 [rows, K]."""
        _ = version
        p = longs_at(address)
        rows, kind, chunks, offset, k = p[1], p[2], p[4], p[12], p[13]
        order, factors, code_scales, code_zeros = ints_at(p[11]), floats_at(p[8]), floats_at(p[9]), floats_at(p[10])
        place, own_table = _chunk_room(), _tables_room()
        planes = bytes_at(place)
        while True:
            row = take(address)
            if row >= rows:
                break
            column = p[3] + row
            table = p[7]
            if table == 0 and kind == 0:
                table = own_table
                fill_table(table, code_scales[column], code_zeros[column])
            out = floats_at(p[14] + 4 * k * row)
            for c in range(chunks):
                read_planes(kind, p[5] + (64 << kind % 3) * (chunks * column + c), table, place)
                for i in range(CHUNK):
                    feature = CHUNK * c + np.int64(order[i])
                    if feature < k:
                        value = np.int64(planes[i]) - offset
                        if kind % 3 == 0:
                            value *= nibble(p[6] + 2 * chunks * column, feature >> 6)
                        out[feature] = np.float32(value) * factors[column]

    return decode
