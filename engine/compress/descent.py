"""Block coordinate descent on the groups of CCQ, after a pass with feedback.

The pass chose each group knowing the errors before it, not those after. Here the scale and the words of each group are
searched again given all other groups, and the super scales given all of them; a change is kept where it lessens
``(q - w) H (q - w)^T``, so the error never grows. (As QuantEase, arXiv 2309.01885, and CDQuant, arXiv 2406.17542, do
for single weights.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compress.codebook import Codebook
from engine.compress.scales import LARGEST, best_scale
from engine.compress.words import Tables
from engine.quantization.wint2 import GROUP_ROWS

_STEPS = (0.0, -1.0, 1.0)  # what to try adding to a group scale
_TINY = torch.finfo(torch.float32).tiny


@dataclass(slots=True)
class State:
    """What is chosen so far for some rows; a sweep changes it.

    Attributes:
        codes: int64 [R, groups, 16].
        levels: 4-bit scales, fp32 [R, groups].
        supers: fp32 [R], as bf16 holds them.
    """

    codes: Tensor
    levels: Tensor
    supers: Tensor

    def unscaled(self, book: Codebook) -> Tensor:
        """Q over the super scales, fp32 [R, K]."""
        return (book.vectors[self.codes].flatten(2) * self.levels[..., None]).flatten(1)

    def take(self, other: State, rows: Tensor) -> None:
        """Take over the rows, bool [R], of another state."""
        self.codes[rows], self.levels[rows], self.supers[rows] = (
            other.codes[rows],
            other.levels[rows],
            other.supers[rows],
        )


def descend(rows: Tensor, matrix: Tensor, tables: Tables, state: State, *, sweeps: int, beams: int = 1) -> None:
    """Improve a state.

    Args:
        rows: the weights, fp32 [R, K].
        matrix: H, fp32 [K, K].
        tables: of the factors of H's diagonal blocks, a group each.
        state: changed.
        sweeps: how often to go over all groups.
        beams: of the search of a group's words.
    """
    weighted = rows @ matrix  # W H
    for _ in range(sweeps):
        slope = _refit_supers(rows, weighted, matrix, tables, state)  # (W - Q) H [R, K]
        for group in range(state.levels.shape[1]):
            here = slice(group * GROUP_ROWS, (group + 1) * GROUP_ROWS)
            change = _search_again(slope[:, here], matrix[here, here], tables, state, group=group, beams=beams)
            slope.addmm_(change, matrix[here], alpha=-1)
    if sweeps:
        _refit_supers(rows, weighted, matrix, tables, state)


def _refit_supers(rows: Tensor, weighted: Tensor, matrix: Tensor, tables: Tables, state: State) -> Tensor:
    """Set the super scale of each row to ``<w, q> / <q, q>`` in H, where bf16 holds a better one; (W - Q) H."""
    unscaled = state.unscaled(tables.book)
    product = unscaled @ matrix
    square, inner = (unscaled * product).sum(dim=1), (rows * product).sum(dim=1)
    best = (inner / square.clamp(min=_TINY)).bfloat16().float()
    better = (best > 0) & (best * (best * square - 2 * inner) < state.supers * (state.supers * square - 2 * inner))
    state.supers = torch.where(better, best, state.supers)
    return weighted - product * state.supers[:, None]


def _search_again(slope: Tensor, matrix: Tensor, tables: Tables, state: State, *, group: int, beams: int) -> Tensor:
    """Search a group's scale and words again.

    Args:
        slope: (W - Q) H of the group, [R, 64].
        matrix: H of the group, [64, 64].
        tables: of all groups.
        state: changed.
        group: which.
        beams: of the search.

    Returns:
        How much Q changed, [R, 64].
    """
    supers, level = state.supers[:, None], state.levels[:, group]
    now = tables.book.vectors[state.codes[:, group]].flatten(1) * (level[:, None] * supers)
    # Given the other groups, the error is (y - q) H_gg (y - q)^T and a constant, with y = q + slope H_gg^-1.
    factor = tables.factors[group]
    missing = slope @ factor.T @ factor  # y - q; H_gg^-1 = U^T U
    near = (level[:, None] + torch.tensor(_STEPS, device=level.device)).clamp(1, LARGEST)  # [R, C]
    best, found = best_scale(tables, group, now + missing, near * supers, beams=beams)
    better = found.costs[:, 0] < (missing @ matrix * missing).sum(dim=1)
    levels = torch.where(better, near.gather(1, best[:, None])[:, 0], level)
    codes = torch.where(better[:, None], found.codes[:, 0], state.codes[:, group])
    state.levels[:, group], state.codes[:, group] = levels, codes
    return tables.book.vectors[codes].flatten(1) * (levels[:, None] * supers) - now
