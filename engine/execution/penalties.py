"""What changes single logits before sampling: logit_bias, the three penalties, min_tokens, grammars.

All but the last touch few tokens of a row, so all of a batch's changes are gathered into flat (row, token) lists on the
host and applied with one gather and one scatter. A grammar's mask is a bit for each token, which the device unpacks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.execution.sampler import SamplingRow


def adjust(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Collection[int]) -> Tensor:
    """Apply every row's logit_bias, then its penalties, then the min_tokens mask (vLLM's order), or a grammar's.

    Who makes a grammar's mask has seen to ``min_tokens`` already, as a grammar that must end does so before.

    Args:
        logits: float32 [rows, used vocabulary]; left as it is.

    Returns:
        ``logits`` itself where no row asks for a change, else a changed copy.
    """
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    penalized = [i for i, row in enumerate(rows) if has_penalties(row.params)]
    bound = [i for i, row in enumerate(rows) if row.allowed is not None]
    masked = [
        i for i, row in enumerate(rows) if len(row.output_token_ids) < row.params.min_tokens and row.allowed is None
    ]
    if not (biased or penalized or masked or bound):
        return logits
    logits = logits.clone()  # [rows, vocab]
    if biased:
        _add_bias(logits, rows, biased)
    if penalized:
        _penalize(logits, rows, penalized)
    if masked:
        _mask_stops(logits, rows, masked, eos_token_ids)
    if bound:
        _mask_forbidden(logits, rows, bound)
    return logits


def has_penalties(params: SamplingParams) -> bool:
    """Whether any penalty differs from its neutral value."""
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def _add_bias(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    entries = [
        (i, token, bias)
        for i in indices
        for token, bias in rows[i].params.logit_bias.items()
        if 0 <= token < logits.shape[1]
    ]
    if entries:
        index = _index(logits, [entry[0] for entry in entries], [entry[1] for entry in entries])
        logits[index] += torch.tensor([entry[2] for entry in entries], dtype=torch.float32, device=logits.device)


def _penalize(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    """Repetition over prompt and output tokens (CTRL, arXiv 1909.05858), presence and frequency over output tokens.

    ``x = x / r if x > 0 else x * r`` for tokens seen, then ``x -= frequency * count + presence * (count > 0)``.
    """
    vocab_size = logits.shape[1]
    row_ids: list[NDArray[np.int64]] = []
    token_ids: list[NDArray[np.int64]] = []
    factors: list[NDArray[np.float32]] = []  # what the penalties of one row come to, token by token
    subtrahends: list[NDArray[np.float32]] = []
    for i in indices:
        row, params = rows[i], rows[i].params
        output, counts = np.unique(_tokens(row.output_token_ids, vocab_size), return_counts=True)
        seen = output
        if params.repetition_penalty != 1.0:
            seen = np.union1d(_tokens(row.prompt_token_ids, vocab_size), output)
        occurrences = np.zeros(len(seen), dtype=np.float32)
        occurrences[np.searchsorted(seen, output)] = counts
        row_ids.append(np.full(len(seen), i, dtype=np.int64))
        token_ids.append(seen)
        factors.append(np.full(len(seen), params.repetition_penalty, dtype=np.float32))
        subtrahends.append(
            (params.frequency_penalty * occurrences + params.presence_penalty * (occurrences > 0)).astype(np.float32)
        )
    index = _index(logits, np.concatenate(row_ids), np.concatenate(token_ids))
    factor = torch.from_numpy(np.concatenate(factors)).to(logits.device)
    subtrahend = torch.from_numpy(np.concatenate(subtrahends)).to(logits.device)
    values = logits[index]  # [entries]
    logits[index] = torch.where(values > 0, values / factor, values * factor) - subtrahend


def _mask_stops(
    logits: Tensor, rows: Sequence[SamplingRow], indices: list[int], eos_token_ids: Collection[int]
) -> None:
    entries = [
        (i, token)
        for i in indices
        for token in {*rows[i].params.stop_token_ids, *(() if rows[i].params.ignore_eos else eos_token_ids)}
        if 0 <= token < logits.shape[1]
    ]
    if entries:
        logits[_index(logits, [entry[0] for entry in entries], [entry[1] for entry in entries])] = float("-inf")


def _mask_forbidden(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    words = np.stack([allowed for i in indices if (allowed := rows[i].allowed) is not None])
    octets = torch.from_numpy(words.view(np.uint8)).to(logits.device)  # [bound, octets], the lowest bits first
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = (octets.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(1)  # [bound, 32 * words]
    forbidden = bits[:, : logits.shape[1]] == 0
    if len(indices) == len(rows):
        logits.masked_fill_(forbidden, float("-inf"))
    else:
        index = torch.as_tensor(indices, device=logits.device)
        logits[index] = logits[index].masked_fill_(forbidden, float("-inf"))


def _tokens(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    tokens = np.asarray(token_ids, dtype=np.int64)
    return tokens[(tokens >= 0) & (tokens < vocab_size)]


def _index(
    logits: Tensor, rows: list[int] | NDArray[np.int64], tokens: list[int] | NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(rows, device=logits.device), torch.as_tensor(tokens, device=logits.device)
