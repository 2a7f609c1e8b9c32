"""Which tokens go to which experts, and back, compiled; see `kernels.cpu.compiled` for the form."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, types

from kernels.cpu.arithmetic import ZERO, dot, exp
from kernels.cpu.words import float_of, floats_at, longs_at, take

_LEAST = np.float32(-np.inf)


def choose(version: str, *, cache: bool) -> Any:
    """The top-k experts of each token."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def choose(address: Any) -> None:
        """Counter, tokens, E, k, logits fp32 [., E], bias or 0, bits of the least divisor, weights out, ids out
        int64, room fp32 [., E], x or 0, H, gate fp32 [E, H]: with x the logits are computed first."""
        _ = version
        p = longs_at(address)
        tokens, experts, top_k = p[1], p[2], p[3]
        bias, least = floats_at(p[5]), float_of(np.int32(p[6]))
        while True:
            t = take(address)
            if t >= tokens:
                break
            shares, scores = floats_at(p[4] + 4 * experts * t), floats_at(p[9] + 4 * experts * t)
            weights, ids = floats_at(p[7] + 4 * top_k * t), longs_at(p[8] + 8 * top_k * t)
            if p[10]:
                for e in range(experts):
                    shares[e] = dot(p[10] + 4 * p[11] * t, p[12] + 4 * p[11] * e, p[11])
            top = shares[0]
            for e in range(experts):
                top = max(top, shares[e])
            whole = ZERO
            for e in range(experts):
                shares[e] = exp(shares[e] - top)
            for e in range(experts):
                whole += shares[e]
            for e in range(experts):
                shares[e] /= whole
            for e in range(experts):
                score = shares[e] + bias[e] if p[5] else shares[e]
                scores[e] = score if score > _LEAST else _LEAST  # a NaN is below every number
            total = ZERO
            for k in range(top_k):
                best: Any = np.int64(-1)
                for e in range(experts):
                    # A NaN marks what is taken; equal scores go to the lower expert.
                    if scores[e] == scores[e] and (best < 0 or scores[e] > scores[best]):
                        best = e
                ids[k], weights[k] = best, shares[best]
                total += shares[best]
                scores[best] = np.float32(np.nan)
            divisor = total if total > least or total != total else least
            for k in range(top_k):
                weights[k] /= divisor

    return choose


def arrange(version: str, *, cache: bool) -> Any:
    """Pairs of a token and an expert it chose, sorted by expert, those of an expert by token."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def arrange(address: Any) -> None:
        """Counter, out: number of active experts int64 [1], pairs, k, E, ids int64 [pairs], places int64 [E + 1] for
        use, segments out int64 [., 3], entries of the first product out int64 [pairs, 2], of the second."""
        _ = version
        p = longs_at(address)
        if take(address):
            return
        pairs, top_k, experts = p[2], p[3], p[4]
        ids, places, segments = longs_at(p[5]), longs_at(p[6]), longs_at(p[7])
        first, second = longs_at(p[8]), longs_at(p[9])
        for e in range(experts):
            places[e] = 0
        for i in range(pairs):
            places[ids[i]] += 1
        active, before = 0, 0
        for e in range(experts):
            count = places[e]
            places[e] = before
            if count:
                segments[3 * active], segments[3 * active + 1], segments[3 * active + 2] = e, before, count
                active += 1
            before += count
        for i in range(pairs):
            place = places[ids[i]]
            places[ids[i]] += 1
            first[2 * place], first[2 * place + 1] = i // top_k, place
            second[2 * place], second[2 * place + 1] = place, i
        longs_at(p[1])[0] = active

    return arrange


def combine(version: str, *, cache: bool) -> Any:
    """Weighted sums of the results of each token's experts, in the order of its choice."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def combine(address: Any) -> None:
        """Counter, tokens, k, H, weights fp32 [., k], results [., k, H], out [., H]."""
        _ = version
        p = longs_at(address)
        tokens, top_k, h = p[1], p[2], p[3]
        while True:
            t = take(address)
            if t >= tokens:
                break
            weights, out = floats_at(p[4] + 4 * top_k * t), floats_at(p[6] + 4 * h * t)
            for i in range(h):
                out[i] = ZERO
            for k in range(top_k):
                weight, row = weights[k], floats_at(p[5] + 4 * h * (top_k * t + k))
                for i in range(h):
                    out[i] += weight * row[i]

    return combine
