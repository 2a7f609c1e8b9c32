"""Log probabilities of given tokens, and of the most likely ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.messages import TokenLogprobs


def report(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """``log_softmax`` of each row's logits at one token, and at its likeliest tokens.

    Args:
        logits: float32 [rows, used vocabulary], at least one row.
        token_ids: one for each row.
        counts: how many of the likeliest each row reports.
    """
    logprobs = logits.log_softmax(dim=-1)  # [rows, used vocab]
    tokens = torch.tensor(token_ids, device=logits.device)
    taken = logprobs.gather(-1, tokens.unsqueeze(-1))  # [rows, 1]
    ranks: list[int] = (1 + (logprobs > taken).sum(dim=-1)).tolist()
    values: list[float] = taken.squeeze(-1).tolist()
    top_values, top_ids = logprobs.topk(min(max(counts), logprobs.shape[1]), dim=-1)  # [rows, k]
    tops = zip(top_ids.tolist(), top_values.tolist(), strict=True)
    return [
        TokenLogprobs(token_id, value, rank, dict(zip(ids[:count], best[:count], strict=True)))
        for token_id, count, value, rank, (ids, best) in zip(token_ids, counts, values, ranks, tops, strict=True)
    ]
