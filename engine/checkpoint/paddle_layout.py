"""Paddle's interleaved bytes of WINT8 and WINT4 <-> plain integers [K, N].

``paddle.nn.quant.weight_quantize(W[K, N], algo, arch=80)`` labels its output [N, K] (int8) or [N/2, K] (int4), but
the bytes are laid out for a tensor-core kernel. Everything moves inside tiles of 64 rows by 2 (int8) or 4 (int4)
columns, 128 bytes each, and a tile's bytes are consecutive; tiles go along K first. So a cut along tile borders is a
slice of ``bytes.view(N / columns, K / 64, 128)``.

Source: checked against PaddlePaddle 3.3.1, byte for byte (``tests/data/golden``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import CheckpointError

TILE_ROWS = 64
TILE_BYTES = 128
INT8_TILE_COLUMNS = 2
INT4_TILE_COLUMNS = 4


def decode_int8(quant_weight: Tensor) -> Tensor:
    """Integers of a WINT8 matrix.

    Args:
        quant_weight: int8 or uint8 [N, K], Paddle's bytes.

    Returns:
        int8 [K, N] (a transposed view of [N, K] storage), -127..127.

    Raises:
        CheckpointError: K is not a multiple of 64 or N of 2.
    """
    n, k = quant_weight.shape
    _check(k, n, INT8_TILE_COLUMNS)
    tiles = _as_uint8(quant_weight).reshape(n // 2, k // 64, 2, 4, 8, 2)  # [n/2, k/64, n%2, k/16%4, k%8, k/8%2]
    values = tiles.permute(0, 2, 1, 3, 5, 4).reshape(n, k)
    # The stored byte is q + 128; flipping the top bit is the same as subtracting 128.
    return (values ^ 0x80).view(torch.int8).T


def encode_int8(values: Tensor) -> Tensor:
    """Paddle's bytes, int8 [N, K], of int8 ``values`` [K, N]; the inverse of :func:`decode_int8`."""
    k, n = values.shape
    _check(k, n, INT8_TILE_COLUMNS)
    logical = (values.T.contiguous().view(torch.uint8) ^ 0x80).view(n // 2, 2, k // 64, 4, 2, 8)
    return logical.permute(0, 2, 1, 3, 5, 4).reshape(n, k).view(torch.int8)


def decode_int4(quant_weight: Tensor) -> Tensor:
    """Integers of a WINT4 matrix.

    Args:
        quant_weight: int8 or uint8 [N/2, K], Paddle's bytes, two values each.

    Returns:
        int8 [K, N] (a transposed view of [N, K] storage), -8..7.

    Raises:
        CheckpointError: K is not a multiple of 64 or N of 4.
    """
    half, k = quant_weight.shape
    n = 2 * half
    _check(k, n, INT4_TILE_COLUMNS)
    packed = _as_uint8(quant_weight).reshape(-1)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    tiles = nibbles.view(n // 4, k // 64, 4, 2, 4, 2, 4)  # [n/4, k/64, n%4, k/32%2, k/2%4, k%2, k/8%4]
    values = tiles.permute(0, 2, 1, 3, 6, 4, 5).reshape(n, k)
    return (values.view(torch.int8) - 8).T


def encode_int4(values: Tensor) -> Tensor:
    """Paddle's bytes, int8 [N/2, K], of int8 ``values`` [K, N] in -8..7; the inverse of :func:`decode_int4`."""
    k, n = values.shape
    _check(k, n, INT4_TILE_COLUMNS)
    logical = (values.T.contiguous() + 8).view(torch.uint8).view(n // 4, 4, k // 64, 2, 4, 4, 2)
    nibbles = logical.permute(0, 2, 1, 3, 5, 6, 4).reshape(-1, 2)
    return (nibbles[:, 0] | (nibbles[:, 1] << 4)).view(torch.int8).view(n // 2, k)


def _check(k: int, n: int, columns: int) -> None:
    if k % TILE_ROWS or n % columns:
        raise CheckpointError(
            f"a [K={k}, N={n}] matrix has no Paddle layout: K must be a multiple of {TILE_ROWS} and N of {columns}"
        )


def _as_uint8(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
