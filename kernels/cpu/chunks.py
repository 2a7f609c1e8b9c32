"""Chunks of packed weights, decoded and multiplied: by `kernels.cpu.vector` where the machine can, or in loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kernels.cpu import vector
from kernels.cpu.layout import CHUNK, DIRECT, WIDE_BYTES
from kernels.cpu.planes import KINDS
from kernels.cpu.words import bytes_at, floats_at, halves_at, room

NATIVE = vector.native()
HALF = np.float32(0.5)

_direct_ccq_1, _direct_ccq_2 = (vector.direct("ccq", tokens, own=False) for tokens in (1, 2))
_direct_own_1, _direct_own_2 = (vector.direct("ccq", tokens, own=True) for tokens in (1, 2))
_direct_int4_1, _direct_int4_2 = (vector.direct("int4", tokens, own=False) for tokens in (1, 2))
_direct_int8_1, _direct_int8_2 = (vector.direct("int8", tokens, own=False) for tokens in (1, 2))
_direct_line_1, _direct_line_2 = (vector.direct("line", tokens, own=False) for tokens in (1, 2))
_unpack_ccq, _unpack_int4, _unpack_int8, _unpack_line = (vector.unpack(kind) for kind in KINDS)
_tile, _tile_scaled = vector.tile(scaled=False), vector.tile(scaled=True)

_chunk_room = room(4 * CHUNK)


@njit(error_model="numpy")
def fill_table(table: Any, scale: Any, zero: Any) -> None:
    """A column's codebook [4, 256], by the reference's arithmetic: each operation rounds by itself."""
    entries = bytes_at(table)
    for u in range(256):
        word = np.int32(np.floor(np.float32(u) * scale + zero + HALF))
        for j in range(4):
            entries[256 * j + u] = np.uint8((word >> (9 - 3 * j)) & 63)


@njit(error_model="numpy")
def nibble(scales: Any, group: Any) -> Any:
    """Scale of a group; an even one is the high half of its byte."""
    byte = np.int64(bytes_at(scales)[group >> 1])
    return (byte & 15) if group & 1 else (byte >> 4)


@njit(error_model="numpy")
def read_planes(kind: Any, codes: Any, table: Any, target: Any) -> None:
    """A chunk's four planes of 64 unsigned bytes."""
    source, planes, entries = bytes_at(codes), bytes_at(target), bytes_at(table)
    if kind == 0:
        for r in range(64):
            u = np.int64(source[r])
            for j in range(4):
                planes[64 * j + r] = entries[256 * j + u]
    elif kind == 3:
        for place in range(256):
            plane, lane, r = place >> 6, (place >> 2) & 15, place & 3
            u = np.int64(source[16 * (lane >> 2) + 8 * (plane >> 1) + 4 * ((lane >> 1) & 1) + r])
            planes[place] = entries[256 * (2 * (plane & 1) + (lane & 1)) + u]
    elif kind == 1:
        for half in range(2):
            for r in range(64):
                byte = source[64 * half + r]
                planes[128 * half + r] = byte & np.uint8(15)
                planes[128 * half + 64 + r] = byte >> np.uint8(4)
    else:
        for i in range(256):
            planes[i] = source[i]


@njit(error_model="numpy")
def _unpack_plain(
    kind: Any, codes: Any, scales: Any, table: Any, out: Any, steps: Any, chunks: Any, offset: Any
) -> None:
    """`vector.unpack` in loops that LLVM vectorises for whatever there is."""
    place = _chunk_room()
    planes = bytes_at(place)
    for c in range(chunks):
        read_planes(kind, codes + (64 << kind % 3) * c, table, place)
        wide, lanes = halves_at(out + WIDE_BYTES * c), floats_at(steps + 64 * c)
        for j in range(4):
            for i in range(32):
                wide[64 * j + i] = np.int16(planes[64 * j + 2 * i]) - np.int16(offset)
                wide[64 * j + 32 + i] = np.int16(planes[64 * j + 2 * i + 1]) - np.int16(offset)
        if kind % 3 == 0:
            for g in range(4):
                scale = np.float32(nibble(scales, 4 * c + g))
                for i in range(4):
                    lanes[4 * g + i] = scale


@njit(error_model="numpy")
def _unpack_native(
    kind: Any, codes: Any, scales: Any, table: Any, out: Any, steps: Any, chunks: Any, offset: Any
) -> None:
    if kind == 0:
        _unpack_ccq(codes, scales, table, out, steps, chunks)
    elif kind == 1:
        _unpack_int4(codes, scales, table, out, steps, chunks)
    elif kind == 3:
        _unpack_line(codes, scales, table, out, steps, chunks)
    else:
        _unpack_int8(codes, scales, table, out, steps, chunks)


@njit(error_model="numpy")
def _direct(
    kind: Any,
    own: Any,
    tokens: Any,
    codes: Any,
    scales: Any,
    tables: Any,
    factors: Any,
    inputs: Any,
    outputs: Any,
    chunks: Any,
    rows: Any,
) -> None:
    if kind == 0 and own:
        if tokens == 1:
            _direct_own_1(codes, scales, tables, factors, inputs, outputs, chunks, rows)
        else:
            _direct_own_2(codes, scales, tables, factors, inputs, outputs, chunks, rows)
    elif kind == 0:
        if tokens == 1:
            _direct_ccq_1(codes, scales, tables, factors, inputs, outputs, chunks, rows)
        else:
            _direct_ccq_2(codes, scales, tables, factors, inputs, outputs, chunks, rows)
    elif kind == 3:
        if tokens == 1:
            _direct_line_1(codes, scales, tables, factors, inputs, outputs, chunks, rows)
        else:
            _direct_line_2(codes, scales, tables, factors, inputs, outputs, chunks, rows)
    elif kind == 1:
        if tokens == 1:
            _direct_int4_1(codes, scales, tables, factors, inputs, outputs, chunks, rows)
        else:
            _direct_int4_2(codes, scales, tables, factors, inputs, outputs, chunks, rows)
    else:
        if tokens == 1:
            _direct_int8_1(codes, scales, tables, factors, inputs, outputs, chunks, rows)
        else:
            _direct_int8_2(codes, scales, tables, factors, inputs, outputs, chunks, rows)


@njit(error_model="numpy")
def _no_direct(*arguments: Any) -> None:
    """In place of `_direct` where the machine lacks its instructions: never called."""


unpack = _unpack_native if NATIVE else _unpack_plain
multiply = _direct if NATIVE else _no_direct
MOST_DIRECT = DIRECT if NATIVE else 0
"""Tokens up to which `multiply` is worth it, instead of `unpack` and then `add_tile`."""


@njit(error_model="numpy")
def add_tile(kind: Any, planes: Any, steps: Any, inputs: Any, chunks: Any, sums: Any) -> None:
    """`vector.tile` for a kind."""
    if kind % 3 == 0:
        _tile_scaled(planes, steps, inputs, chunks, sums)
    else:
        _tile(planes, steps, inputs, chunks, sums)
