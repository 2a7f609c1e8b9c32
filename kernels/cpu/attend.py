"""Attention of one query a request straight from the pages of the cache, compiled; see `kernels.cpu.compiled`.

A context is cut into spans of `POSITIONS`, and a task is one kv head of one span: its keys and values are read once for
all query heads that share them. Softmax is the running one of arXiv 2205.14135, by tiles of `SCORES` positions; who
finishes a head's last span adds the spans up, in their order (arXiv 2311.01282), so that a result does not depend on
the threads or on what else is in the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit, types

from kernels.cpu.arithmetic import ZERO, dot, exp, from_fp16
from kernels.cpu.layout import POSITIONS, SCORES
from kernels.cpu.words import add, float_of, floats_at, halves_at, ints_at, longs_at, signed_at, take

_LOWEST = np.float32(-3e38)
_ONE = np.float32(1.0)


@njit(fastmath={"contract"}, error_model="numpy")
def _add_scaled(target: Any, source: Any, factor: Any, count: Any) -> None:
    out, x = floats_at(target), floats_at(source)
    for i in range(count):
        out[i] += factor * x[i]


@njit(error_model="numpy")
def _scale(target: Any, factor: Any, count: Any) -> None:
    out = floats_at(target)
    for i in range(count):
        out[i] *= factor


@njit(error_model="numpy")
def _divide(target: Any, source: Any, divisor: Any, count: Any) -> None:
    out, x = floats_at(target), floats_at(source)
    for i in range(count):
        out[i] = x[i] / divisor


@njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _dot_int8(a: Any, b: Any, count: Any) -> Any:
    """`arithmetic.dot` of fp32 with int8."""
    x, y = floats_at(a), signed_at(b)
    total = ZERO
    for i in range(count):
        total += x[i] * np.float32(y[i])
    return total


@njit(fastmath={"contract"}, error_model="numpy")
def _add_scaled_int8(target: Any, source: Any, factor: Any, count: Any) -> None:
    out, x = floats_at(target), signed_at(source)
    for i in range(count):
        out[i] += factor * np.float32(x[i])


def attend(version: str, *, cache: bool) -> Any:
    """Decode attention; see `kernels.cpu.attention`."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def attend(address: Any) -> None:
        """Counter, number of spans at an address, kv heads, query heads of each, D, block size, spans int32 [., 4]
        (request, which of its spans, its first, how many), block tables int32, entries of a row, context lengths int32,
        rows of q int32, q, bytes from row to row, keys, values, bits of the scale, states fp32 [spans, kv heads, heads
        (2 + D + SCORES)] (largest score, sum, output, a tile's scores), zeros int64 [requests, kv heads], left as
        zeros, out [., heads, D], scales of int8 keys or 0, of int8 values."""
        _ = version
        p = longs_at(address)
        kv_heads, group, d, block_size = p[2], p[3], p[4], p[5]
        tasks = longs_at(p[1])[0] * kv_heads
        spans, contexts, rows = ints_at(p[6]), ints_at(p[9]), ints_at(p[10])
        scale = float_of(np.int32(p[15]))
        packed = p[19] != 0
        item = 1 if packed else 4
        key_scales, value_scales = halves_at(p[19]), halves_at(p[20])
        state_bytes, row_bytes = 4 * group * (2 + d + SCORES), item * d * kv_heads
        while True:
            task = take(address)
            if task >= tasks:
                break
            span, head = 4 * (task // kv_heads), task % kv_heads
            request, number, first, count = spans[span], spans[span + 1], spans[span + 2], spans[span + 3]
            table, context = ints_at(p[7] + 4 * p[8] * request), contexts[request]
            query = p[11] + p[12] * rows[request] + 4 * d * group * head
            state = p[16] + state_bytes * task
            tops, sums, out = floats_at(state), floats_at(state + 4 * group), state + 8 * group
            scores = out + 4 * group * d
            for g in range(group):
                tops[g], sums[g] = _LOWEST, ZERO
                acc = floats_at(out + 4 * d * g)
                for i in range(d):
                    acc[i] = ZERO
            end = min(context, POSITIONS * (number + 1))
            for begin in range(POSITIONS * number, end, SCORES):
                length = min(SCORES, end - begin)
                for i in range(length):
                    block, place = np.int64(table[(begin + i) // block_size]), (begin + i) % block_size
                    key = p[13] + row_bytes * (block * block_size + place) + item * d * head
                    if packed:
                        factor = scale * from_fp16(key_scales[(block * kv_heads + head) * block_size + place])
                        for g in range(group):
                            floats_at(scores + 4 * SCORES * g)[i] = _dot_int8(query + 4 * d * g, key, d) * factor
                    else:
                        for g in range(group):
                            floats_at(scores + 4 * SCORES * g)[i] = dot(query + 4 * d * g, key, d) * scale
                for g in range(group):
                    weights = floats_at(scores + 4 * SCORES * g)
                    top = tops[g]
                    for i in range(length):
                        top = max(top, weights[i])
                    shrink = exp(tops[g] - top)
                    total = sums[g] * shrink
                    for i in range(length):
                        weights[i] = exp(weights[i] - top)
                    for i in range(length):
                        total += weights[i]
                    _scale(out + 4 * d * g, shrink, d)
                    tops[g], sums[g] = top, total
                for i in range(length):
                    block, place = np.int64(table[(begin + i) // block_size]), (begin + i) % block_size
                    value = p[14] + row_bytes * (block * block_size + place) + item * d * head
                    if packed:
                        factor = from_fp16(value_scales[(block * kv_heads + head) * block_size + place])
                        for g in range(group):
                            weight = floats_at(scores + 4 * SCORES * g)[i] * factor
                            _add_scaled_int8(out + 4 * d * g, value, weight, d)
                    else:
                        for g in range(group):
                            _add_scaled(out + 4 * d * g, value, floats_at(scores + 4 * SCORES * g)[i], d)
            if count > 1:
                finished = p[17] + 8 * (kv_heads * request + head)
                if add(finished, 1) != count - 1:
                    continue
                longs_at(finished)[0] = 0
            start = p[16] + state_bytes * (kv_heads * first + head)
            for g in range(group):
                target = start + 8 * group + 4 * d * g
                top, total = floats_at(start)[g], floats_at(start + 4 * group)[g]
                for s in range(1, count):
                    other = start + state_bytes * kv_heads * s
                    their_top, their_total = floats_at(other)[g], floats_at(other + 4 * group)[g]
                    new = max(top, their_top)
                    mine, theirs = exp(top - new), exp(their_top - new)
                    _scale(target, mine, d)
                    _add_scaled(target, other + 8 * group + 4 * d * g, theirs, d)
                    top, total = new, total * mine + their_total * theirs
                result = p[18] + 4 * d * ((kv_heads * rows[request] + head) * group + g)
                _divide(result, target, total, d)

    return attend


def divide(version: str, *, cache: bool) -> Any:
    """Contexts into spans."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def divide(address: Any) -> None:
        """Counter, requests, context lengths int32, number of spans out int64 [1], spans out int32 [., 4]."""
        _ = version
        p = longs_at(address)
        if take(address):
            return
        contexts, spans = ints_at(p[2]), ints_at(p[4])
        total = 0
        for request in range(p[1]):
            count, first = (contexts[request] + POSITIONS - 1) // POSITIONS, total
            for number in range(count):
                place = 4 * total
                spans[place], spans[place + 1] = request, number
                spans[place + 2], spans[place + 3] = first, count
                total += 1
        longs_at(p[3])[0] = total

    return divide
