"""The pass of CCQ over the groups of some rows: scales and words one group after another, errors carried forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.compress.scales import LARGEST, best_scale
from engine.compress.words import Found, Tables, search
from engine.quantization.wint2 import GROUP_ROWS


def run(
    rows: Tensor,
    tables: Tables,
    factor: Tensor | None,
    levels: Tensor,
    supers: Tensor,
    *,
    steps: Sequence[int] = (0,),
    beams: int = 1,
) -> tuple[Tensor, Tensor]:
    """Choose all words, and the group scales near those given.

    A group's scale is the one under which its words, chosen greedily from the best way so far, cost least. With
    ``beams`` > 1 the words are then chosen again by a beam search, whose ways differ in the last two groups only: when
    a group is done, the one before it is settled as the best way has it, so that the rest of the row is one for all.

    Args:
        rows: fp32 [R, K].
        tables: of all groups.
        factor: U, fp32 [K, K], which carries errors from group to group; None carries none.
        levels: 4-bit scales to start from, fp32 [R, groups].
        supers: fp32 [R].
        steps: what to try adding to a level.
        beams: ways kept.

    Returns:
        codes int64 [R, groups, 16], levels fp32 [R, groups].
    """
    rest = rows.clone()
    tries = torch.tensor(steps, dtype=torch.float32, device=rows.device)
    chosen, settled = [], []
    costs = torch.zeros_like(rows[:, :1])  # [R, 1]
    before: Found | None = None
    for group, start in enumerate(levels.unbind(dim=1)):
        level, first = start, group * GROUP_ROWS
        done, here = slice(first - GROUP_ROWS, first), slice(first, first + GROUP_ROWS)
        targets = rest[:, None, here].expand(-1, costs.shape[1], -1)  # [R, B, 64]
        if before is not None and factor is not None:
            targets = targets - before.errors @ factor[done, here]
        if len(steps) > 1:
            near = (start[:, None] + tries).clamp(1, LARGEST)  # [R, C]
            best, found = best_scale(tables, group, targets[:, 0], near * supers[:, None])
            level = near.gather(1, best[:, None])[:, 0]
        if len(steps) == 1 or beams > 1:
            found = search(tables, group, targets, costs, level * supers, beams=beams)
        chosen.append(level)
        costs = found.costs
        if before is not None:
            way = found.origins[:, :1]  # of the best
            settled.append(_way(before.codes, way))
            if factor is not None:
                rest[:, here.stop :].addmm_(_way(before.errors, way), factor[done, here.stop :], alpha=-1)
            costs = costs.masked_fill(found.origins != way, torch.inf)
        before = found
    if before is not None:
        settled.append(before.codes[:, 0])
    return torch.stack(settled, dim=1), torch.stack(chosen, dim=1)


def _way(tensor: Tensor, way: Tensor) -> Tensor:
    """[R, B, n] -> [R, n]: the entry ``way`` [R, 1] of each row."""
    return tensor.gather(1, way[..., None].expand(-1, -1, tensor.shape[-1]))[:, 0]
