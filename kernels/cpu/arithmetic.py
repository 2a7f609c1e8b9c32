"""Functions of fp32 numbers in operations that vectorise: LLVM has no vector form of the C library's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kernels.cpu.words import bits_of, float_of, floats_at

_LOWEST, _HIGHEST = np.float32(-87.3), np.float32(88.7)
"""Between them e^x is a normal number."""
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
MAGIC = np.float32(1.5 * 2**23)
"""Adding it to a float of less than 2^22 leaves no bits for a fraction: rounds to nearest, ties to even."""
_ONE, _HALF = np.float32(1.0), np.float32(0.5)
_TWO_TO_112 = np.float32(2.0**112)
_LEAST_NORMAL = np.float32(2.0**-14)
ZERO = np.float32(0.0)


@njit(error_model="numpy")
def exp(x: Any) -> Any:
    """e^x within 2 units of the last place (Cephes' expf); below -87.3 and above 88.7 as there; NaN stays."""
    bounded = _LOWEST if x < _LOWEST else (_HIGHEST if x > _HIGHEST else x)
    n = (bounded * _LOG2_E + MAGIC) - MAGIC
    r = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + _HALF
    y = p * r * r + r + _ONE
    exponent = np.int32(n if n == n else ZERO)
    return y * float_of((exponent + np.int32(127)) << np.int32(23))


@njit(error_model="numpy")
def silu(x: Any) -> Any:
    """``x / (1 + e^-x)``."""
    return x / (_ONE + exp(-x))


@njit(error_model="numpy")
def from_fp16(half: Any) -> Any:
    """The fp32 of an int16's bits as a positive fp16: its exponent is 112 less."""
    return float_of(np.int32(half) << np.int32(13)) * _TWO_TO_112


@njit(error_model="numpy")
def to_fp16(x: Any) -> Any:
    """The bits, as int16, of a positive fp32 of at most 65504 as fp16, rounded to nearest, ties to even."""
    if x < _LEAST_NORMAL:  # the last place of 0.5 in fp32 is that of these in fp16
        return np.int16(bits_of(x + _HALF) - bits_of(_HALF))
    bits = bits_of(x)
    rounded = bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1))
    return np.int16((rounded >> np.int32(13)) - np.int32(112 << 10))


@njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def dot(a: Any, b: Any, count: Any) -> Any:
    """Of `count` fp32 at two addresses, in any order of the summands, which lets them be added in lanes."""
    x, y = floats_at(a), floats_at(b)
    total = ZERO
    for i in range(count):
        total += x[i] * y[i]
    return total
