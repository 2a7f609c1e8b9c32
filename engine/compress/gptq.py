"""GPTQ (arXiv 2210.17323): round input by input and let the inputs not yet rounded make up for each error.

The grid decides as much as the feedback does. With ``clip`` each group's scale and zero point are searched for the
least squared error, each input weighted by what its error will cost once those after it have made up for it
(1 / U[t,t]^2); without, they span the group's least and greatest value, which is what "GPTQ at 2 bits" often means and
is far worse.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from engine.compress.feedback import chunks, group_order
from engine.compress.grid import Codes, Grid
from engine.compress.hessian import Metric
from engine.compress.integers import Integers, format_of
from engine.compress.packed import PackedWeight
from engine.compress.sweep import Remainder

_BLOCK = 128
"""Inputs that take over the errors of all earlier ones in one product; GPTQ's value."""


def quantize(
    weight: Tensor,
    hessian: Tensor | Metric | None = None,
    *,
    bits: Literal[2, 4, 8] = 2,
    group_size: int | None = 64,
    clip: bool = True,
    act_order: bool = True,
    sweeps: int = 0,
) -> PackedWeight:
    """Quantize a linear to integers with error feedback.

    Args:
        weight: [out, in].
        hessian: [in, in], X X^T of calibration inputs. None: no input is related to another, nothing is fed back.
        bits: 2, 4 or 8.
        group_size: inputs that share a scale and a zero point, ``gptq`` format. None: one scale an output feature and
            no zero point, in Paddle's bytes (``wint4``, ``wint8``).
        clip: search the grid, or span the extremes.
        act_order: begin with the heaviest inputs, groups kept whole; the format stays the same.
        sweeps: how often each group is chosen again after the pass (``engine.compress.sweep``); GPTQ's is 0.

    Raises:
        UnsupportedError: the format can't hold the shape, or there is no format for the options.
        ConfigError: the Hessian is not one (see :class:`Metric`).
        CheckpointError: the weight holds values that are not finite.
    """
    out_features, in_features = weight.shape
    format_of(bits=bits, group_size=group_size).tensors(in_features, out_features)
    metric = Metric.of(hessian, in_features, device=weight.device)
    kind = Codes.symmetric(bits) if group_size is None else Codes.asymmetric(bits)
    integers, _ = round_with_feedback(
        weight, metric, kind, group_size=group_size, clip=clip, act_order=act_order, sweeps=sweeps
    )
    return integers.packed(bits=bits, group_size=group_size)


def round_with_feedback(
    weight: Tensor,
    metric: Metric,
    kind: Codes,
    *,
    group_size: int | None,
    clip: bool = True,
    act_order: bool = True,
    sweeps: int = 0,
) -> tuple[Integers, float]:
    """Choose grids and codes of ``weight`` [N, K]; the arguments are those of :func:`quantize`.

    Returns:
        The integers, and their output error ``tr((Q - W) H (Q - W)^T)`` as the encoder counts it.
    """
    n, k = weight.shape
    size = group_size or k
    order = group_order(metric, size) if act_order else torch.arange(k, device=weight.device)
    factor = metric.inverse_factor(order if act_order else None)
    matrix = metric.matrix[order][:, order] if sweeps else metric.matrix
    codes = torch.empty((k, n), dtype=torch.int16, device=weight.device)
    zeros = torch.empty((k // size, n), dtype=torch.int32, device=weight.device)
    scales = torch.empty_like(zeros, dtype=kind.dtype)
    column, error = 0, 0.0
    for chunk in chunks(weight):
        part = slice(column, column := column + chunk.shape[1])
        weights = chunk[order]
        blocks, errors = _feed_back(weights, factor, kind, group_size=group_size, clip=clip)
        if sweeps:
            off = -(factor.T @ errors)  # Q - W
            for _ in range(sweeps):
                _sweep(blocks, off, weights, matrix, new_grids=group_size is not None, clip=clip)
            error += float((off.double() * (matrix @ off)).sum())
        else:
            error += float(errors.double().square().sum())
        codes[order, part] = torch.cat([block.codes for block in blocks])
        for block, first in zip(blocks, range(0, k, group_size or _BLOCK), strict=True):
            stored = order[first] // size
            zeros[stored, part], scales[stored, part] = (
                block.grid.zeros.to(zeros.dtype),
                block.grid.scales.to(kind.dtype),
            )
    return Integers(codes, zeros, scales), error


class _Block(NamedTuple):
    """Some inputs in codes int16 [G, R]."""

    codes: Tensor
    grid: Grid


def _feed_back(
    weights: Tensor, factor: Tensor, kind: Codes, *, group_size: int | None, clip: bool
) -> tuple[list[_Block], Tensor]:
    """One pass over the inputs of ``weights`` fp32 [K, R]: the blocks, and the errors [K, R] in units of their cost."""
    rows = weights.clone()  # behind the pass, errors
    importance = factor.diagonal() ** -2
    step = group_size or _BLOCK
    grid = None if group_size else _grid(kind, rows, importance, clip=clip)
    blocks = []
    for first in range(0, len(rows), step):
        inputs = slice(first, min(first + step, len(rows)))
        current = rows[inputs] - factor[:first, inputs].T @ rows[:first]
        chosen = grid or _grid(kind, current, importance[inputs], clip=clip)
        codes, rows[inputs] = _round(current, factor[inputs, inputs], chosen)
        blocks.append(_Block(codes, chosen))
    return blocks, rows


def _grid(kind: Codes, values: Tensor, importance: Tensor, *, clip: bool) -> Grid:
    return Grid.clipping(kind, values, importance) if clip else Grid.spanning(kind, values)


def _round(target: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes int16 [G, R] and errors fp32 [G, R] of a block ``target`` [G, R] with U [G, G], errors fed forward."""
    codes, errors = torch.empty_like(target, dtype=torch.int16), torch.empty_like(target)
    inverse = (1 / factor.diagonal().double()).tolist()
    for t in range(len(target)):
        value = torch.addmv(target[t], errors[:t].T, factor[:t, t], alpha=-1)
        code = grid.codes(value)
        codes[t] = code
        torch.mul(value - grid.values(code), inverse[t], out=errors[t])
    return codes, errors


def _sweep(blocks: list[_Block], off: Tensor, weights: Tensor, matrix: Tensor, *, new_grids: bool, clip: bool) -> None:
    """Choose each block again, all others as they are. ``blocks`` and ``off`` (Q - W) [K, R] are brought up to date.

    Inputs are in the order of the pass: ``weights`` [K, R] and H = ``matrix`` [K, K].
    """
    first = 0
    for i, (codes, grid) in enumerate(blocks):
        inputs = slice(first, first := first + len(codes))
        left = Remainder.of(off, matrix, inputs)
        target = weights[inputs] + left.aim
        importance = left.factor.diagonal() ** -2
        other = _grid(grid.kind, target, importance, clip=clip) if new_grids else grid
        again, _ = _round(target, left.factor, other)
        new = other.values(again) - weights[inputs]
        better = left.better(new, off[inputs])
        off[inputs] = torch.where(better, new, off[inputs])
        blocks[i] = _Block(torch.where(better, again, codes), grid.where(better, other))
