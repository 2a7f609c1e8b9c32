"""top_k, top_p and min_p: which tokens of a row may be drawn.

Each filter is a threshold on the row's scores, so tokens with equal scores are kept or dropped together, and the
result does not depend on the order in which a sort puts them:

* top_k keeps scores at least as high as the k-th highest;
* top_p keeps scores at least as high as the last of the shortest run of highest-scored tokens whose probabilities sum
  to top_p or more; probabilities are those of what top_k left;
* min_p keeps tokens at least ``min_p`` times as likely as the most likely one.

A full sort of the vocabulary is the dearest step of sampling, and the kept tokens are few as a rule. So
:func:`candidates` looks at the highest ``HEAD`` scores of each row, and says on the device which rows' kept sets may
reach beyond them: only the whole order settles those (:func:`sorted_candidates`), and whoever asks learns of them with
the tokens that were drawn, in one transfer. Which way a row takes depends on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling_params import SamplingParams

HEAD = 256


@dataclass(frozen=True, slots=True)
class Filter:
    """The filter of one row. ``top_k`` 0: all; ``top_p`` 1: all; ``min_p`` 0: all."""

    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, params: SamplingParams) -> Filter:
        """The filter a request asks for."""
        return cls(top_k=max(params.top_k, 0), top_p=params.top_p, min_p=params.min_p)

    @property
    def needs_order(self) -> bool:
        """Whether the highest scores have to be found in order."""
        return self.top_k > 0 or self.top_p < 1.0


@dataclass(frozen=True, slots=True)
class Candidates:
    """What may be drawn in some rows.

    ``rows`` int64 [part]: which rows of the call. ``token_ids`` int64 [tokens] or [part, tokens].
    ``scores`` float32 [part, tokens]: -inf for tokens filtered out. ``settled`` bool [part]: whether that is all that
    may be drawn; None where it is in every row.
    """

    rows: Tensor
    token_ids: Tensor
    scores: Tensor
    settled: Tensor | None = None


def candidates(scores: Tensor, filters: Sequence[Filter]) -> Iterator[Candidates]:
    """Split the rows by how they are filtered; every row is in exactly one of the results.

    Args:
        scores: float32 [rows, vocab]: logits divided by the temperature, shifted so that each row's highest is 0.
    """
    vocab_size = scores.shape[1]
    ordered = [i for i, kept in enumerate(filters) if kept.needs_order]
    unordered = [i for i, kept in enumerate(filters) if not kept.needs_order]
    if unordered:
        rows = _rows(unordered, scores)
        part = scores if len(unordered) == len(scores) else scores[rows]
        floor = _min_p_threshold([filters[i] for i in unordered], scores)
        yield Candidates(rows, _all_tokens(scores), part if floor is None else _cut(part, floor))
    if ordered:
        rows = _rows(ordered, scores)
        part = scores if len(ordered) == len(scores) else scores[rows]
        chosen = [filters[i] for i in ordered]
        head, token_ids = part.topk(min(HEAD, vocab_size), dim=-1)  # [ordered, head], highest first
        threshold = _threshold(head, part, chosen)  # [ordered]
        # Strictly above the head's end: nothing outside the head can reach the threshold.
        settled = threshold > head[:, -1] if head.shape[1] < vocab_size else None
        yield Candidates(rows, token_ids, _cut(head, threshold), settled)


def sorted_candidates(scores: Tensor, filters: Sequence[Filter]) -> Candidates:
    """What may be drawn in rows that :func:`candidates` has not settled; arguments as there."""
    threshold = _threshold(scores.sort(dim=-1, descending=True).values, scores, filters)
    return Candidates(_rows(list(range(len(filters))), scores), _all_tokens(scores), _cut(scores, threshold))


def _threshold(head: Tensor, scores: Tensor, filters: Sequence[Filter]) -> Tensor:
    """Lowest score that each row keeps, float32 [rows], as far as ``head`` (its highest scores, in order) settles it.

    A threshold that the head doesn't settle comes out as the head's last score.
    """
    size, end = head.shape[1], head[:, -1:]  # end [rows, 1]
    last = [min(kept.top_k or size, size) - 1 for kept in filters]
    kth = head.gather(-1, torch.tensor(last, device=head.device).unsqueeze(-1))  # [rows, 1]
    floor = _min_p_threshold(filters, scores)
    threshold = kth if floor is None else torch.maximum(kth, floor.unsqueeze(-1))
    if any(kept.top_p < 1.0 for kept in filters):
        # float64: the sum's rounding must not depend on how a device orders the additions.
        bounded = torch.tensor([[kept.top_k > 0] for kept in filters], device=head.device)  # [rows, 1]
        kept_head = head.double().masked_fill(bounded & (head < kth), float("-inf"))  # [rows, head]
        total = torch.where(bounded, kept_head.logsumexp(-1, keepdim=True), _logsumexp(scores))  # [rows, 1]
        probabilities = (kept_head - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities  # [rows, head]
        top_p = torch.tensor([[kept.top_p] for kept in filters], dtype=torch.float64, device=head.device)
        count = ((before < top_p) | (top_p == 1.0)).sum(dim=-1, keepdim=True).clamp_(min=1)  # before[0] may be -0
        threshold = torch.maximum(threshold, head.gather(-1, count - 1))
        if size < scores.shape[1]:
            # top_k reaches beyond the head, so what top_p is a part of is not known yet.
            threshold = torch.where(bounded & (top_p < 1.0) & (kth <= end), end, threshold)
    return threshold.squeeze(-1)


def _min_p_threshold(filters: Sequence[Filter], scores: Tensor) -> Tensor | None:
    """log(min_p) of each row, float32 [rows]; scores are relative to the row's highest. None where no row has one."""
    if not any(kept.min_p for kept in filters):
        return None
    return torch.tensor([math.log(kept.min_p) if kept.min_p else -math.inf for kept in filters], device=scores.device)


def _logsumexp(scores: Tensor) -> Tensor:
    return scores.logsumexp(dim=-1, keepdim=True).double()  # [rows, 1]


def _cut(scores: Tensor, threshold: Tensor) -> Tensor:
    return scores.masked_fill(scores < threshold.unsqueeze(-1), float("-inf"))


def _rows(indices: list[int], scores: Tensor) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=scores.device)


def _all_tokens(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device)  # [vocab]
