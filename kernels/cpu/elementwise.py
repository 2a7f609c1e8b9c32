"""Norms, rotation and activation of fp32 rows in one pass each, compiled; see `kernels.cpu.compiled` for the form."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit, types

from kernels.cpu.arithmetic import MAGIC, ZERO, from_fp16, silu, to_fp16
from kernels.cpu.words import add_lanes, float_of, floats_at, halves_at, longs_at, room, signed_at, take

_ONE = np.float32(1.0)
_lanes_room = room(64)


def norm(version: str, *, cache: bool) -> Any:
    """RMSNorm, of a sum where there is a second summand."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def norm(address: Any) -> None:
        """Counter, tokens, H, x, bytes from row to row, residual or 0, its bytes, sum out or 0, weight, out, bits of
        eps."""
        _ = version
        p = longs_at(address)
        tokens, h = p[1], p[2]
        weight, eps = floats_at(p[8]), float_of(np.int32(p[10]))
        place = _lanes_room()
        lanes = floats_at(place)
        while True:
            t = take(address)
            if t >= tokens:
                break
            total, out = floats_at(p[3] + p[4] * t), floats_at(p[9] + 4 * h * t)
            if p[5]:
                x, residual, total = total, floats_at(p[5] + p[6] * t), floats_at(p[7] + 4 * h * t)
                for i in range(h):
                    total[i] = x[i] + residual[i]
            for i in range(16):
                lanes[i] = ZERO
            whole = h & ~15
            for i in range(0, whole, 16):
                for j in range(16):
                    lanes[j] += total[i + j] * total[i + j]
            for i in range(whole, h):
                lanes[i - whole] += total[i] * total[i]
            factor = _ONE / np.sqrt(add_lanes(place) / np.float32(h) + eps)
            for i in range(h):
                out[i] = total[i] * factor * weight[i]

    return norm


def look_up(version: str, *, cache: bool) -> Any:
    """Rows of a table."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def look_up(address: Any) -> None:
        """Counter, tokens, rows, H, ids int64, first row, table fp32 [rows, H], out [., H]: zeros for rows beyond."""
        _ = version
        p = longs_at(address)
        tokens, rows, h = p[1], p[2], p[3]
        ids = longs_at(p[4])
        while True:
            t = take(address)
            if t >= tokens:
                break
            row, out = ids[t] - p[5], floats_at(p[7] + 4 * h * t)
            if row < 0 or row >= rows:
                for i in range(h):
                    out[i] = ZERO
                continue
            source = floats_at(p[6] + 4 * h * row)
            for i in range(h):
                out[i] = source[i]

    return look_up


def activate(version: str, *, cache: bool) -> Any:
    """silu(gate) * up."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def activate(address: Any) -> None:
        """Counter, tokens, I, x [., 2I], bytes from row to row, out [., I]."""
        _ = version
        p = longs_at(address)
        tokens, width = p[1], p[2]
        while True:
            t = take(address)
            if t >= tokens:
                break
            gate, out = floats_at(p[3] + p[4] * t), floats_at(p[5] + 4 * width * t)
            up = floats_at(p[3] + p[4] * t + 4 * width)
            for i in range(width):
                out[i] = silu(gate[i]) * up[i]

    return activate


@njit(error_model="numpy")
def _store_int8(source: Any, target: Any, scale: Any, count: Any) -> None:
    """`kernels.reference.cache.quantize` of a row; `scale` is the address of its fp16."""
    x, out = floats_at(source), signed_at(target)
    top = ZERO
    for i in range(count):
        top = max(top, abs(x[i]))
    half = to_fp16(min(top / np.float32(127.0), np.float32(65504.0)))
    halves_at(scale)[0] = half
    divisor = from_fp16(half)
    if divisor == ZERO:
        divisor = _ONE
    for i in range(count):
        value = (x[i] / divisor + MAGIC) - MAGIC
        out[i] = np.int8(min(max(value, np.float32(-127.0)), np.float32(127.0)))


def rotate(version: str, *, cache: bool) -> Any:
    """Queries and keys turned, keys and values written to their slots."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def rotate(address: Any) -> None:
        """Counter, tokens, heads, kv heads, D, qkv, bytes from row to row, table (cos, sin) [., D/2], interleaved,
        slots int64, keys, values, out [., heads, D], number of slots, out: tokens whose slot is none of them, scales of
        int8 keys or 0, of int8 values, block size. With int8, out is [., heads + kv heads, D]."""
        _ = version
        p = longs_at(address)
        tokens, heads, kv_heads, d, interleaved = p[1], p[2], p[3], p[4], p[8]
        packed, block_size, half = p[15] != 0, p[17], d // 2
        slots = longs_at(p[9])
        written = heads + kv_heads if packed else heads
        while True:
            t = take(address)
            if t >= tokens:
                break
            slot = slots[t]
            if slot < 0 or slot >= p[13]:
                take(address + 8 * 14)
                continue
            source, table = p[5] + p[6] * t, floats_at(p[7] + 8 * half * t)
            for head in range(heads + kv_heads):
                x = floats_at(source + 4 * d * head)
                target = p[12] + 4 * d * (written * t + head)
                if head >= written:
                    target = p[10] + 4 * d * (kv_heads * slot + head - heads)
                out = floats_at(target)
                if interleaved:
                    for i in range(half):
                        a, b, cos, sin = x[2 * i], x[2 * i + 1], table[2 * i], table[2 * i + 1]
                        out[2 * i], out[2 * i + 1] = a * cos - b * sin, b * cos + a * sin
                else:
                    for i in range(half):
                        a, b, cos, sin = x[i], x[half + i], table[2 * i], table[2 * i + 1]
                        out[i], out[half + i] = a * cos - b * sin, b * cos + a * sin
            for head in range(kv_heads):
                value = source + 4 * d * (heads + kv_heads + head)
                if packed:
                    row = d * (kv_heads * slot + head)
                    scale = 2 * ((slot // block_size * kv_heads + head) * block_size + slot % block_size)
                    _store_int8(p[12] + 4 * d * (written * t + heads + head), p[10] + row, p[15] + scale, d)
                    _store_int8(value, p[11] + row, p[16] + scale, d)
                else:
                    v, out = floats_at(value), floats_at(p[11] + 4 * d * (kv_heads * slot + head))
                    for i in range(d):
                        out[i] = v[i]

    return rotate
