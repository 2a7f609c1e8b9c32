"""Scales of CCQ: 4 bits for a group of 64 weights, bf16 for a column."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.compress.codebook import Codebook
from engine.compress.words import Found, Tables, search
from engine.quantization.wint2 import GROUP_ROWS, WORD_ROWS

LARGEST = 15
_GRID = (0.6, 1.5, 16)  # scales tried, relative to the guessed one
_TINY = torch.finfo(torch.float32).tiny

# A scale without a search. Inside its range a codebook's error per weight goes with the square of the scale, beyond it
# with the square of what is cut off. 256 vectors in the cube [-32, 32)^4 have cells of side 16: variance 16^2/12.
_CELL_VARIANCE = 16**2 / 12
_REACH = 27.0  # of 31: few vectors have several large entries
_RATIOS = (-0.4, 0.8, 24)  # decimal logarithms of the scales tried, relative to the one of the group's RMS
FEEDBACK_MARGIN = 1.1
"""What feedback adds to a scale: errors handed on make later weights larger, and one out of reach is an error that the
words after it can't make up for."""


def super_of(scales: Tensor, largest: int) -> Tensor:
    """Super scales, as bf16 holds them, for which the largest group scale of a row is ``largest``: fp32 [R].

    Args:
        scales: [R, groups].
        largest: 1..15.
    """
    return (scales.amax(dim=1) / largest).bfloat16().float()


def levels_of(scales: Tensor, supers: Tensor) -> Tensor:
    """The 4-bit scales, fp32 [R, groups] of whole numbers 1..15."""
    return (scales / supers.clamp(min=_TINY)[:, None]).round().clamp(1, LARGEST)


def guess(rows: Tensor, book: Codebook, importance: Tensor) -> Tensor:
    """Scales for [R, K] without a search of words, [R, K/64]: the least error of a model of the codebook.

    Args:
        rows: fp32 [R, K].
        book: the codebook.
        importance: what a squared error of each input costs, [K]. It decides whose large weights are worth reaching.
    """
    groups = rows.view(len(rows), -1, GROUP_ROWS).abs()
    shares = importance.view(-1, GROUP_ROWS)
    shares = shares / shares.sum(dim=1, keepdim=True)
    unit = groups.square().mean(dim=2).sqrt() / book.rms
    best, least = unit, torch.full_like(unit, torch.inf)
    for ratio in torch.logspace(*_RATIOS).tolist():
        scales = unit * ratio
        cut = (groups - _REACH * scales[..., None]).clamp_(min=0).square_().mul_(shares).sum(dim=2)
        error = cut + _CELL_VARIANCE * scales.square()
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def searched(rows: Tensor, tables: Tables) -> Tensor:
    """Real scales of [R, K], [R, K/64]: the best of a grid, then a least-squares fit to the words it leads to.

    ``tables`` should be of factors that carry no error from word to word.
    """
    unit = guess(rows, tables.book, torch.ones_like(rows[0]))
    candidates = torch.linspace(*_GRID, device=rows.device)  # [C]
    fitted = []
    for group, scale in enumerate(unit.unbind(dim=1)):
        weights = rows[:, group * GROUP_ROWS : (group + 1) * GROUP_ROWS]
        tried = scale[:, None] * candidates
        best, found = best_scale(tables, group, weights, tried)
        vectors = tables.book.vectors[found.codes[:, 0]].flatten(1)  # [R, 64]
        x, q = (
            torch.einsum("rwi,wij->rwj", v.view(rows.shape[0], -1, WORD_ROWS), tables.corners[group]).flatten(1)
            for v in (weights.contiguous(), vectors)
        )
        fit = (x * q).sum(dim=1) / q.square().sum(dim=1).clamp(min=_TINY)
        fitted.append(torch.where(fit > 0, fit, tried.gather(1, best[:, None])[:, 0]))
    return torch.stack(fitted, dim=1)


def best_scale(
    tables: Tables, group: int, targets: Tensor, candidates: Tensor, *, beams: int = 1
) -> tuple[Tensor, Found]:
    """Choose a group's words under each of some scales, and keep the scale under which they cost least.

    Args:
        tables: of all groups.
        group: which.
        targets: the group's weights, [R, 64].
        candidates: scales, [R, C].
        beams: of the search.

    Returns:
        Which candidate, int64 [R], and the best way under it.
    """
    rows, count = candidates.shape
    repeated = targets[:, None].expand(-1, count, -1).reshape(-1, 1, GROUP_ROWS)
    found = search(tables, group, repeated, torch.zeros_like(repeated[..., 0]), candidates.reshape(-1), beams=beams)
    best = found.costs[:, 0].view(rows, count).argmin(dim=1)
    pick = best + torch.arange(0, rows * count, count, device=best.device)
    return best, Found(found.codes[pick, :1], found.errors[pick, :1], found.costs[pick, :1], found.origins[pick, :1])
