"""Nested bit planes: one set of four that reads well as the first two, the first three, or all.

Planes chosen for two bits and then kept are far from the best start for four, and the other way round the first two of
four are worse still. Here all readings are encoded in one pass, each with its own coefficients and its own errors fed
forward, and each weight's four bits are those of the least weighted sum of the three readings' errors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.compress.bitplanes import Group, bits_of
from engine.compress.bpdq import ITERATIONS
from engine.compress.feedback import chunks, group_order
from engine.compress.hessian import Metric
from engine.compress.packed import PackedWeight
from engine.errors import ConfigError
from engine.quantization.bitplane import PLANES, Bitplane, pack_planes

_STORED = PLANES[-1]


def quantize(
    weight: Tensor,
    hessian: Tensor | Metric | None = None,
    *,
    group_size: int = 64,
    importance: tuple[float, float, float] = (1.0, 1.0, 1.0),
    iterations: int = ITERATIONS,
) -> PackedWeight:
    """Quantize a linear to four nested bit planes.

    Args:
        weight: [out, in].
        hessian: [in, in], X X^T of calibration inputs. None: no input is related to another.
        group_size: inputs that share coefficients; ``in`` is a multiple of it.
        importance: of the output error of the readings of 2, 3 and 4 planes. As the errors of more planes are smaller
            (about four times for each), equal ones put the reading of two first; (1, 4, 16) treats all alike.
        iterations: rounds of choosing bits and fitting coefficients.

    Raises:
        UnsupportedError: the format can't hold the shape, or has no such group size.
        ConfigError: the Hessian is not one (see :class:`Metric`), or an importance is not positive.
        CheckpointError: the weight holds values that are not finite.
    """
    if len(importance) != len(PLANES) or min(importance) <= 0:
        raise ConfigError(f"importance is {importance}; expected three positive numbers, for 2, 3 and 4 planes")
    n, k = weight.shape
    weight_format = Bitplane(planes=_STORED, group_size=group_size, nested=True)
    weight_format.tensors(k, n)
    metric = Metric.of(hessian, k, device=weight.device)
    order = group_order(metric, group_size)
    factor = metric.inverse_factor(order)
    bits = torch.empty((k, _STORED, n), dtype=torch.uint8, device=weight.device)
    coefficients = {
        f"coefficients_{count}": torch.empty(
            (k // group_size, count + 1, n), dtype=torch.bfloat16, device=weight.device
        )
        for count in PLANES
    }
    column = 0
    for chunk in chunks(weight):
        part = slice(column, column := column + chunk.shape[1])
        readings = [chunk[order] for _ in PLANES]  # weights; behind the pass, errors in units of what they cost
        for first in range(0, k, group_size):
            group = slice(first, first + group_size)
            targets = [rows[group] - factor[:first, group].T @ rows[:first] for rows in readings]
            nested = _solve(targets, factor[group, group], importance, iterations=iterations)
            stored = order[group]
            bits[stored, :, part] = nested.bits.to(torch.uint8)
            for rows, fitted, errors in zip(readings, nested.coefficients, nested.errors, strict=True):
                rows[group] = errors
                coefficients[f"coefficients_{len(fitted) - 1}"][stored[0] // group_size, :, part] = fitted.bfloat16()
    return PackedWeight(weight_format, (n, k), {"planes": pack_planes(bits), **coefficients})


class _Nested(NamedTuple):
    """Bits fp32 [G, 4, R]; for each reading its coefficients [k+1, R] and errors [G, R], see ``bitplanes.Solution``."""

    bits: Tensor
    coefficients: list[Tensor]
    errors: list[Tensor]


def _solve(targets: list[Tensor], factor: Tensor, importance: tuple[float, ...], *, iterations: int) -> _Nested:
    """One group, from each reading's own weights ``targets`` [G, R], as earlier groups' errors left them."""
    bits = targets[0].new_empty((len(factor), 0, targets[0].shape[1]))
    for count, target in zip(PLANES, targets, strict=True):  # start: one reading after the other
        bits = Group.of(target, factor, bits).solve(count, iterations=iterations).bits
    none = bits[:, :0]
    groups = [Group.of(target, factor, none) for target in targets]
    best, rows, subset = bits, torch.arange(bits.shape[2], device=bits.device), groups
    fitted, least = _fit(groups, bits, importance)
    for _ in range(iterations):
        before, bits = bits, _choose(subset, fitted, importance)
        moved = (bits != before).any(dim=1).any(dim=0).nonzero().flatten()
        if not len(moved):  # a row that an iteration leaves as it is would be left by all later ones
            break
        subset, rows, bits = [group.of_rows(moved) for group in subset], rows[moved], bits[..., moved]
        fitted, score = _fit(subset, bits, importance)
        better = score < least[rows]
        least[rows[better]] = score[better]
        best = best.index_copy(2, rows[better], bits[..., better])
    final = [group.fit(best[:, :count]) for group, count in zip(groups, PLANES, strict=True)]
    return _Nested(best, [coefficients for coefficients, _ in final], [errors for _, errors in final])


def _fit(groups: list[Group], bits: Tensor, importance: tuple[float, ...]) -> tuple[list[Tensor], Tensor]:
    """Each reading's coefficients for bits [G, 4, R], and the weighted sum of their squared errors [R]."""
    fits = [group.fit(bits[:, :count]) for group, count in zip(groups, PLANES, strict=True)]
    squares = [weight * errors.square_().sum(dim=0) for weight, (_, errors) in zip(importance, fits, strict=True)]
    return [coefficients for coefficients, _ in fits], torch.stack(squares).sum(dim=0)


def _choose(groups: list[Group], fitted: list[Tensor], importance: tuple[float, ...]) -> Tensor:
    """Input by input the four bits of the least weighted error, each reading's errors fed forward: fp32 [G, 4, R]."""
    size, width = groups[0].target.shape
    codes = torch.arange(2**_STORED, device=fitted[0].device)
    levels = [  # of all 16 codes, of which a reading sees the first bits only: [R, 16]
        group.levels(coefficients, count)[codes % 2**count].T.contiguous()
        for group, coefficients, count in zip(groups, fitted, PLANES, strict=True)
    ]
    roots = [weight**0.5 for weight in importance]
    picks = torch.empty((size, width), dtype=torch.int64, device=codes.device)
    errors = [torch.empty_like(group.target) for group in groups]
    for t in range(size):
        offs = [
            torch.addmv(group.target[t], error[:t].T, group.unit[t, :t], alpha=-1)[:, None] - level
            for group, error, level in zip(groups, errors, levels, strict=True)
        ]
        cost = sum((off * root).square_() for off, root in zip(offs, roots, strict=True))
        pick = torch.argmin(cost, dim=1, keepdim=True)
        picks[t] = pick[:, 0]
        for error, off in zip(errors, offs, strict=True):
            error[t] = off.gather(1, pick)[:, 0]
    return bits_of(picks.to(torch.uint8), _STORED)
