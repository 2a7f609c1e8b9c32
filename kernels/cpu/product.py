"""Products with packed weights.

Activations are rounded to 16 bits once for each product, for all output features: a product errs by at most ``sum over
groups of 64 of max|x| / 65024 * sum|w|``, besides fp32's own rounding. A row's result is the same to the bit whatever
else is in the batch, except where a machine without `kernels.cpu.vector`'s instructions multiplies a large one densely.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.layout import CHUNK_BYTES, OFFSETS, TABLE_BYTES, TILE
from kernels.cpu.packed import PackedPrepared
from kernels.cpu.threads import Stage, has_vnni, run

DENSE_ROWS = 32
"""Rows from which on, without those instructions, decoding to fp32 for torch's product takes less time than plain
loops over integers; with them it never does (benchmarks/cpu_decode.py, batch 64)."""
PASSES = 4
"""Tokens that take about as long as reading a matrix."""
GRAIN_BYTES = 128 << 10
"""Weights that a thread takes at a time: what fetches ahead of it begins anew with each piece, and threads that took
every other small one would wait for memory more than they compute."""
LEAST_GRAINS = 16
"""Pieces that are to be had at least, so that threads end together."""
DENSE_BYTES = 8 << 20
"""Decoded weights at a time; they stay in a cache between the decoder and the product."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Which entries go to which matrix of a stack.

    Attributes:
        rows: int64 [S, 3], contiguous: a matrix, its first entry, how many.
        count: int64 [1]: how many of the rows there are; the others mean nothing.
    """

    rows: Tensor
    count: Tensor


def multiply(x: Tensor, weight: PackedPrepared, segments: Segments, entries: Tensor) -> Tensor:
    """Rows of x times matrices of a stack.

    Args:
        x: [T, K], any floating dtype.
        weight: stack of matrices (K, N).
        segments: of the entries.
        entries: int64 [P, 2]: row of x, row of the result; each row of the result once.

    Returns:
        fp32 [P, N].
    """
    x = x.float()
    out = torch.empty(entries.shape[0], weight.out_features)
    if not has_vnni() and entries.shape[0] >= DENSE_ROWS:
        segments = _multiply_large(x, weight, segments, entries, out)
    run(*stages(x, weight, segments, entries, out))
    return out


def stages(
    x: Tensor, weight: PackedPrepared, segments: Segments, entries: Tensor, out: Tensor, *, gated: bool = False
) -> tuple[Stage, Stage]:
    """`multiply` as kernels to be run: fp32 `x`, contiguous `entries`, `out` fp32 [P, N].

    With `gated`, x is [T, 2K] and what is multiplied ``silu(x[:, :K]) * x[:, K:]``.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, n, chunks = x.shape[0], weight.out_features, weight.chunks
    inputs = torch.empty(tokens * chunks * CHUNK_BYTES, dtype=torch.uint8)  # torch aligns it to a cache line
    most, tiles = segments.rows.shape[0], -(-n // TILE)
    grain = max(1, min(GRAIN_BYTES * tiles // weight.matrix_bytes, most * tiles // LEAST_GRAINS))
    offset = OFFSETS[weight.kind]
    quantize = (
        *(tokens, weight.in_features, x.data_ptr(), 4 * x.stride(0), inputs.data_ptr()),
        *(weight.order_address, offset, gated),
    )
    product = (
        *(segments.count.data_ptr(), weight.kind, n, chunks, *weight.addresses),
        *(segments.rows.data_ptr(), entries.data_ptr(), inputs.data_ptr(), out.data_ptr(), offset, grain),
    )
    read = weight.matrix_bytes * max(most, entries.shape[0] // PASSES)
    return (
        Stage("quantize", quantize, tasks=tokens, num_bytes=inputs.numel(), keep=x),
        Stage("product", product, tasks=most * tiles, num_bytes=read, keep=(segments, entries, inputs)),
    )


def decode(weight: PackedPrepared, matrix: int, rows: range) -> Tensor:
    """Output features `rows` of a matrix of the stack, fp32 [rows, K], to the bit as the reference decodes them."""
    out = torch.empty(len(rows), weight.in_features)
    first = matrix * weight.out_features + rows.start
    codes, scales, table, *rest = weight.addresses
    arguments = (
        *(len(rows), weight.kind, first, weight.chunks),
        *(codes, scales, table + TABLE_BYTES * matrix if table else 0, *rest),
        *(weight.order_address, OFFSETS[weight.kind], weight.in_features, out.data_ptr()),
    )
    run(Stage("decode", arguments, tasks=len(rows), num_bytes=4 * out.numel()))
    return out


def _multiply_large(x: Tensor, weight: PackedPrepared, segments: Segments, entries: Tensor, out: Tensor) -> Segments:
    """Write the products of the segments of many entries to `out`; the others."""
    rows = segments.rows[: int(segments.count)]
    large = rows[:, 2] >= DENSE_ROWS
    for matrix, first, count in rows[large].tolist():
        of_matrix = entries[first : first + count]  # [count, 2]
        out.index_copy_(0, of_matrix[:, 1], _dense(x.index_select(0, of_matrix[:, 0]), weight, matrix))
    small = rows[~large]
    return Segments(small, torch.tensor([len(small)]))


def _dense(x: Tensor, weight: PackedPrepared, matrix: int) -> Tensor:
    """fp32 [T, K] times one matrix, decoded once for all rows of `x`, some output features at a time."""
    n = weight.out_features
    out = x.new_empty(n, x.shape[0])  # the features of a part lie together
    step = max(1, DENSE_BYTES // (4 * weight.in_features))
    for first in range(0, n, step):
        rows = range(first, min(first + step, n))
        torch.mm(decode(weight, matrix, rows), x.t(), out=out[rows.start : rows.stop])
    return out.t()
