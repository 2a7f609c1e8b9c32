"""Activations as 16-bit integers, in the layout of `kernels.cpu.vector`: loops for `kernels.cpu.compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kernels.cpu.arithmetic import MAGIC
from kernels.cpu.layout import BASE, CHUNK, HIGH, LOW, STEP, WIDE
from kernels.cpu.words import floats_at, halves_at, ints_at, room, signed_at

LARGEST = np.float32(32512.0)
"""The largest activation's integer: 127 * 256, so that rounding to ``256 high + low`` can't carry out of a byte."""
TINY = np.float32(1e-30)
"""Groups of nothing larger count as zeros: `LARGEST` divided by less may not be finite."""

_integers_room = room(4 * CHUNK)
_places_room = room(4 * CHUNK)


@njit(error_model="numpy")
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


@njit(error_model="numpy")
def quantize_chunk(source: Any, count: Any, target: Any, order: Any, offset: Any, narrow: Any) -> None:
    """`count` of a chunk's activations; the bytes only if `narrow`, since no other machine multiplies them."""
    unordered, ordered = _integers_room(), _places_room()
    integers, places, positions = ints_at(unordered), ints_at(ordered), ints_at(order)
    steps, wide = floats_at(target + STEP), halves_at(target + WIDE)
    for g in range(4):
        left = min(64, max(0, count - 64 * g))
        step = _quantize_group(source + 256 * g, left, unordered + 256 * g)
        for i in range(4):
            steps[4 * g + i] = step
    for p in range(CHUNK):
        places[p] = integers[positions[p]]
    for j in range(4):
        for i in range(32):
            wide[64 * j + i] = np.int16(places[64 * j + 2 * i])
            wide[64 * j + 32 + i] = np.int16(places[64 * j + 2 * i + 1])
    if not narrow:
        return
    high, low, bases = signed_at(target + HIGH), signed_at(target + LOW), ints_at(target + BASE)
    for p in range(CHUNK):
        below = ((places[p] + np.int32(128)) & np.int32(255)) - np.int32(128)
        low[p] = np.int8(below)
        high[p] = np.int8((places[p] - below) >> np.int32(8))
    for lane in range(16):
        total = np.int32(0)
        for j in range(4):
            for r in range(4):
                total += places[64 * j + 4 * lane + r]
        bases[lane] = -total * np.int32(offset)
