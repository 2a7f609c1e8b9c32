"""The search for the bytes of one group of 64 weights: four weights a byte, chosen together.

Let e be the errors of a group's weights and R its upper triangular factor: ``e R`` is what they cost, four entries a
word, and the first words' errors reach into the later words' entries. So a word is chosen for the least
``|| (x - s c) R_ww ||`` over the 256 vectors c, x being the weights with what earlier errors cost taken into account,
and its error is handed on: ``x' -= (x - s c) R_ww U_wt`` with U = R^-1 (GPTQ, a word at a time).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compress.codebook import CODES, Codebook
from engine.quantization.wint2 import GROUP_ROWS, WORD_ROWS

GROUP_WORDS = GROUP_ROWS // WORD_ROWS
_TAKEN = torch.iinfo(torch.int32).max
_CPU_DISTANCES = 2**20  # 4 MiB stay in a core's cache
_GPU_DISTANCES = 2**27


@dataclass(frozen=True, slots=True)
class Tables:
    """What the search needs to know of every word's place, group by group.

    Attributes:
        book: the codebook.
        factors: U of each group, fp32 [groups, 64, 64] upper triangular.
        corners: R_ww, fp32 [groups, 16, 4, 4] upper triangular.
        metrics: the metric of the choice, fp32 [groups, 16, 4, 4]: R_ww R_ww^T, or the identity.
        distances: fp32 [groups, 16, 6, 256], see :func:`distances`.
    """

    book: Codebook
    factors: Tensor
    corners: Tensor
    metrics: Tensor
    distances: Tensor

    @classmethod
    def of(cls, book: Codebook, factors: Tensor, *, metric: bool = True) -> Tables:
        """Tables of groups' factors [groups, 64, 64]; without ``metric`` words are chosen by plain distance."""
        squares = factors.view(-1, GROUP_WORDS, WORD_ROWS, GROUP_WORDS, WORD_ROWS)
        upper = squares.diagonal(dim1=1, dim2=3).movedim(-1, 1).double()  # U_ww [groups, 16, 4, 4]
        identity = torch.eye(WORD_ROWS, dtype=torch.float64, device=factors.device).expand_as(upper)
        corners = torch.linalg.solve_triangular(upper, identity, upper=True)
        metrics = corners @ corners.mT if metric else identity
        vectors = book.vectors.double()
        norms = torch.einsum("ui,gwij,uj->gwu", vectors, metrics, vectors)[..., None, :]  # [groups, 16, 1, 256]
        entries = vectors.T.expand(*norms.shape[:2], -1, -1)
        table = torch.cat((entries, norms, torch.ones_like(norms)), dim=-2)
        return cls(book, factors.contiguous(), corners.float(), metrics.float().contiguous(), table.float())


@dataclass(frozen=True, slots=True)
class Found:
    """The words of a group for each of R rows and its B best ways through it, best first.

    Attributes:
        codes: int64 [R, B, 16].
        errors: ``(x - s c) R_ww`` of each word, fp32 [R, B, 64].
        costs: their squares' sum, added to the cost of the way that was gone on with: fp32 [R, B].
        origins: which of the ways handed in that was, int64 [R, B].
    """

    codes: Tensor
    errors: Tensor
    costs: Tensor
    origins: Tensor


def search(tables: Tables, group: int, targets: Tensor, costs: Tensor, scales: Tensor, *, beams: int = 1) -> Found:
    """Choose the words of a group, keeping the ``beams`` best ways so far after each word (1: greedily).

    Args:
        tables: of all groups.
        group: which.
        targets: x, fp32 [R, B0, 64]: the weights as the B0 ways before leave them.
        costs: what those ways cost, fp32 [R, B0]; infinite for one that must not be gone on with.
        scales: fp32 [R].
        beams: how many ways to return.
    """
    budget = _CPU_DISTANCES if targets.device.type == "cpu" else _GPU_DISTANCES
    rows = max(1, budget // (CODES * max(targets.shape[1], beams)))
    parts = zip(*(torch.split(t, rows) for t in (targets, costs, scales)), strict=True)
    found = [_search(tables, group, *part, beams=beams) for part in parts]
    if len(found) == 1:
        return found[0]
    return Found(*(torch.cat([getattr(f, n) for f in found]) for n in ("codes", "errors", "costs", "origins")))


def _search(tables: Tables, group: int, targets: Tensor, costs: Tensor, scales: Tensor, *, beams: int) -> Found:
    vectors, factor = tables.book.vectors, tables.factors[group]
    rows, ways, _ = targets.shape
    base = costs.amin(dim=1, keepdim=True)  # only differences matter, and small numbers keep their digits
    costs = costs - base
    targets = targets.clone()
    scales = scales[:, None, None]
    steps = []  # of each word: the ways it goes on with, the codes and the errors
    for w in range(GROUP_WORDS):
        word, tail = slice(w * WORD_ROWS, (w + 1) * WORD_ROWS), slice((w + 1) * WORD_ROWS, None)
        least = smallest(_distances(tables, (group, w), targets[..., word], costs, scales), beams)  # [R, B]
        chosen, parents = least % CODES, least // CODES
        if beams > 1 or ways > 1:
            flat = parents + torch.arange(0, rows * ways, ways, device=parents.device)[:, None]
            targets = targets.view(rows * ways, -1)[flat]  # [R, B, 64]
            costs = costs.view(-1)[flat]
            ways = beams
        error = (targets[..., word] - scales * vectors[chosen]) @ tables.corners[group, w]  # [R, B, 4]
        costs = costs + error.square().sum(dim=-1)
        if w + 1 < GROUP_WORDS:
            targets[..., tail] -= error @ factor[word, tail]
        steps.append((parents, chosen, error))
    # The ways are followed back from their ends.
    way = torch.arange(beams, device=targets.device).expand(rows, beams)
    codes, errors = [], []
    for parents, chosen, error in reversed(steps):
        codes.append(chosen.gather(1, way))
        errors.append(error.gather(1, way[..., None].expand_as(error)))
        way = parents.gather(1, way)
    return Found(torch.stack(codes[::-1], dim=2), torch.cat(errors[::-1], dim=2), costs + base, way)


def _distances(tables: Tables, place: tuple[int, int], words: Tensor, costs: Tensor, scales: Tensor) -> Tensor:
    """``cost + (x - s c) M (x - s c)^T`` for words x [R, B, 4] and all 256 codes c, as one product: [R, B * 256]."""
    measured = words @ tables.metrics[place]  # x M
    offsets = (measured * words).sum(dim=-1, keepdim=True) + costs[..., None]
    features = torch.cat((-2 * scales * measured, scales.square().expand_as(offsets), offsets), dim=-1)  # [R, B, 6]
    return (features.view(-1, features.shape[-1]) @ tables.distances[place]).view(len(words), -1)


def smallest(distances: Tensor, count: int) -> Tensor:
    """Where the ``count`` least of each row are, best first: int64 [R, count].

    The index takes the place of a distance's lowest bits: floats that are not negative order as their bits do, and the
    least integer of a row is several times faster to find than the place of its least float. So distances that agree
    in their first 15 bits (11 with 16 ways) count as equal, and the lowest index wins.

    Args:
        distances: fp32 [R, ways * 256], not negative, rounding apart; overwritten.
        count: how many.
    """
    rows, n = distances.shape
    mask = (1 << (n - 1).bit_length()) - 1
    indices = torch.arange(n, dtype=torch.int32, device=distances.device)
    keys = distances.view(torch.int32).bitwise_and_(~mask).bitwise_or_(indices).view(rows, -1, CODES)
    least = keys.amin(dim=2)  # of each way, [R, ways]
    row = torch.arange(rows, device=distances.device)
    places = []
    while True:
        place = (least.amin(dim=1) & mask).long()
        places.append(place)
        if len(places) == count:
            return torch.stack(places, dim=1)
        way = place // CODES
        keys[row, way, place % CODES] = _TAKEN
        least[row, way] = keys[row, way].amin(dim=1)
