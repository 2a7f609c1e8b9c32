"""Round to nearest: integers on a grid, each weight for itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.compress.feedback import chunks
from engine.compress.grid import Codes, Grid
from engine.compress.hessian import Metric
from engine.compress.integers import Integers, format_of
from engine.compress.packed import PackedWeight


def quantize(
    weight: Tensor,
    hessian: Tensor | Metric | None = None,
    *,
    bits: Literal[2, 4, 8] = 8,
    group_size: int | None = None,
    clip: bool = False,
) -> PackedWeight:
    """Quantize a linear.

    Without groups and clipping as ``paddle.nn.quant.weight_quantize`` does (weight_only_int8, weight_only_int4; arch
    80), but that values are rounded against the scale as it is stored (bf16): a step's difference in a few values and
    less error.

    Args:
        weight: [out, in].
        hessian: [in, in], X X^T of calibration inputs; its diagonal weights errors in the search for a grid. Rounding
            itself has no use for it.
        bits: 2, 4 or 8.
        group_size: inputs that share a scale and a zero point, ``gptq`` format. None: one scale an output feature, in
            Paddle's bytes (``wint4``, ``wint8``).
        clip: search the grid of least squared error, or span the extremes.

    Raises:
        UnsupportedError: the format can't hold the shape, or there is no format for the options.
        ConfigError: the Hessian is not one (see :class:`Metric`).
        CheckpointError: the weight holds values that are not finite.
    """
    n, k = weight.shape
    format_of(bits=bits, group_size=group_size).tensors(k, n)
    importance = Metric.of(hessian, k, device=weight.device).matrix.diagonal()
    kind = Codes.symmetric(bits) if group_size is None else Codes.asymmetric(bits)
    size = group_size or k
    codes = torch.empty((k, n), dtype=torch.int16, device=weight.device)
    zeros = torch.empty((k // size, n), dtype=torch.int32, device=weight.device)
    scales = torch.empty_like(zeros, dtype=kind.dtype)
    column = 0
    for rows in chunks(weight):
        part = slice(column, column := column + rows.shape[1])
        for group in range(k // size):
            inputs = slice(group * size, (group + 1) * size)
            values = rows[inputs]
            grid = Grid.clipping(kind, values, importance[inputs]) if clip else Grid.spanning(kind, values)
            codes[inputs, part] = grid.codes(values).to(codes.dtype)
            zeros[group, part], scales[group, part] = grid.zeros, grid.scales
    return Integers(codes, zeros, scales).packed(bits=bits, group_size=group_size)
