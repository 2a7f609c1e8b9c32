"""BPDQ (arXiv 2602.04163): bit planes with free coefficients, chosen and fitted in turn, with error feedback.

Group after group, on weights T that already make up for the errors of earlier groups: given the coefficients, each
row's 2^k levels are fixed and its bits are chosen input by input as GPTQ does; given the bits, the coefficients are a
least-squares fit. Both count errors as E = (T - Q) U^-1, whose squares add up to the output error. The refit changes
errors that were fed forward already; taking E anew from the refitted Q is the paper's "delta correction".

Two things differ from the paper, both in favour of the result. Each row keeps the best pair of bits and coefficients it
met (the paper: all rows of one iteration), and coefficients are rounded to bf16 in each iteration, so that the error by
which the best is known is that of what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.compress.bitplanes import Group, Solution
from engine.compress.feedback import chunks, group_order
from engine.compress.hessian import Metric
from engine.compress.packed import PackedWeight
from engine.compress.sweep import Remainder
from engine.quantization.bitplane import Bitplane, pack_planes

ITERATIONS = 10
"""The paper's."""


def quantize(
    weight: Tensor,
    hessian: Tensor | Metric | None = None,
    *,
    planes: Literal[2, 3, 4] = 2,
    group_size: int = 64,
    iterations: int = ITERATIONS,
    sweeps: int = 0,
) -> PackedWeight:
    """Quantize a linear to bit planes, ``planes + 16 (planes + 1) / group_size`` bits a weight.

    Args:
        weight: [out, in].
        hessian: [in, in], X X^T of calibration inputs. None: no input is related to another.
        planes: 2, 3 or 4.
        group_size: inputs that share coefficients; ``in`` is a multiple of it.
        iterations: rounds of choosing bits and fitting coefficients.
        sweeps: how often each group is chosen again after the pass (``engine.compress.sweep``); the paper's is 0.

    Raises:
        UnsupportedError: the format can't hold the shape, or has no such option.
        ConfigError: the Hessian is not one (see :class:`Metric`).
        CheckpointError: the weight holds values that are not finite.
    """
    out_features, in_features = weight.shape
    weight_format = Bitplane(planes=planes, group_size=group_size)
    weight_format.tensors(in_features, out_features)
    metric = Metric.of(hessian, in_features, device=weight.device)
    none = torch.empty((in_features, 0, out_features), device=weight.device)
    chosen = choose_planes(
        weight, metric, none, planes=planes, group_size=group_size, iterations=iterations, sweeps=sweeps
    )
    return PackedWeight(
        weight_format,
        (out_features, in_features),
        {"planes": pack_planes(chosen.bits), "coefficients": chosen.coefficients},
    )


@dataclass(frozen=True, slots=True)
class Planes:
    """A matrix [N, K] in bit planes.

    Attributes:
        bits: uint8 [K, k, N], 0 or 1.
        coefficients: bf16 [K/G, k+1, N], c0 last.
        error: ``tr((Q - W) H (Q - W)^T)`` as the encoder counted it.
    """

    bits: Tensor
    coefficients: Tensor
    error: float


def choose_planes(
    weight: Tensor,
    metric: Metric,
    given: Tensor,
    *,
    planes: int,
    group_size: int,
    iterations: int = ITERATIONS,
    sweeps: int = 0,
) -> Planes:
    """Choose the planes that are not ``given`` (bits [K, f, N], f may be 0), and the coefficients of all."""
    n, k = weight.shape
    order = group_order(metric, group_size)
    factor = metric.inverse_factor(order)
    matrix = metric.matrix[order][:, order] if sweeps else metric.matrix
    bits = torch.empty((k, planes, n), dtype=torch.uint8, device=weight.device)
    coefficients = torch.empty((k // group_size, planes + 1, n), dtype=torch.bfloat16, device=weight.device)
    column, error = 0, 0.0
    for chunk in chunks(weight):
        part = slice(column, column := column + chunk.shape[1])
        weights, fixed = chunk[order], given[..., part][order].float()
        rows = weights.clone()  # behind the pass, errors in units of what they cost
        solutions = []
        for first in range(0, k, group_size):
            group = slice(first, first + group_size)
            target = rows[group] - factor[:first, group].T @ rows[:first]
            solution = Group.of(target, factor[group, group], fixed[group]).solve(planes, iterations=iterations)
            rows[group] = solution.errors
            solutions.append(solution)
        if sweeps:
            off = -(factor.T @ rows)  # Q - W
            for _ in range(sweeps):
                _sweep(solutions, off, weights, fixed, matrix, iterations=iterations)
            error += float((off.double() * (matrix @ off)).sum())
        else:
            error += float(rows.double().square().sum())
        for first, solution in zip(range(0, k, group_size), solutions, strict=True):
            stored = order[first : first + group_size]
            bits[stored, :, part] = solution.bits.to(torch.uint8)
            coefficients[stored[0] // group_size, :, part] = solution.coefficients.to(torch.bfloat16)
    return Planes(bits, coefficients, error)


def _sweep(
    solutions: list[Solution], off: Tensor, weights: Tensor, given: Tensor, matrix: Tensor, *, iterations: int
) -> None:
    """Choose each group again, all others as they are. ``solutions`` and ``off`` (Q - W) [K, R] are brought up to date.

    Inputs are in the order of the pass: ``weights`` [K, R], ``given`` [K, f, R] and H = ``matrix`` [K, K].
    """
    size = len(weights) // len(solutions)
    for i, before in enumerate(solutions):
        group = slice(i * size, (i + 1) * size)
        left = Remainder.of(off, matrix, group)
        planes = before.bits.shape[1]
        again = Group.of(weights[group] + left.aim, left.factor, given[group]).solve(planes, iterations=iterations)
        new = again.values() - weights[group]
        better = left.better(new, off[group])
        off[group] = torch.where(better, new, off[group])
        solutions[i] = Solution(*(torch.where(better, *pair) for pair in zip(again, before, strict=True)))
