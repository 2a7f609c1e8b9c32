"""From logits to tokens.

Order for each row, all over the used part of the vocabulary only (padding ids do not exist here):

1. logit_bias, then repetition, presence and frequency penalties, then the mask of min_tokens or of a grammar
   (:mod:`engine.execution.penalties`);
2. greedy rows take the most likely token (the lowest id among equals);
3. other rows: temperature, then top_k, then top_p over what top_k left, then min_p
   (:mod:`engine.execution.filters`), then Gumbel-max: ``argmax(logit + noise(seed, position, token id))``
   (:mod:`engine.execution.noise`), which draws from the softmax of the filtered logits.

Log probabilities that are reported are those of the model: ``log_softmax`` of its logits over the used vocabulary,
before any of the above.

A row's token depends on its own logits and parameters only, never on the other rows of the call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.execution.filters import Candidates, Filter, candidates, sorted_candidates
from engine.execution.logprobs import report
from engine.execution.noise import gumbel, row_keys
from engine.execution.penalties import adjust
from engine.messages import TokenLogprobs
from engine.sampling_params import SamplingParams

NOT_FINITE, UNSETTLED = -1, -2
"""In place of a token that can't be told yet."""
MIN_TEMPERATURE = 1e-5
"""Temperatures above 0 and below this count as this: 1/T stays finite in float32."""
LOGIT_BYTES = 48
"""What sampling takes for each logit at its peak, at most, the logits themselves aside: rows with penalties that are
sorted whole in float64. A GPU's sort has some room of its own besides."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What decides one row's token besides its logits.

    ``position``: index in the sequence of the token to choose. ``allowed``: the tokens that a grammar allows, a bit
    each, int32 [ceil(used vocabulary / 32)], at least one of them; None where all are.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    position: int
    allowed: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's token, with log probabilities where its parameters ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Chooses one token for each row of logits.

    Args:
        vocab_size: columns of the logits (the embedding table, padding included).
        used_vocab_size: ids below this have a token; the others are never sampled nor reported.
        eos_token_ids: masked while a row has fewer than ``min_tokens`` tokens, unless it ignores EOS.
    """

    def __init__(self, vocab_size: int, used_vocab_size: int, eos_token_ids: Collection[int]) -> None:
        if not 0 < used_vocab_size <= vocab_size:
            raise ValueError(f"used_vocab_size is {used_vocab_size}; expected 1 to vocab_size ({vocab_size})")
        self.vocab_size = vocab_size
        self.used_vocab_size = used_vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)

    @torch.inference_mode()
    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        """Sample one token for each row.

        Args:
            logits: float32 [rows, vocab_size], any device; not changed.

        Raises:
            EngineDeadError: a row's logits hold NaN or +inf, or nothing above -inf.
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected {(len(rows), self.vocab_size)}")
        if not rows:
            return []
        raw = logits[:, : self.used_vocab_size].float()  # [rows, used vocab]
        adjusted = adjust(raw, rows, self.eos_token_ids)
        best, token_ids = adjusted.max(dim=-1)  # [rows]; max carries NaN along
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        if drawn:
            token_ids[drawn] = self._draw(adjusted, best, rows, drawn)
        # All that the host must know comes with the tokens: one transfer, for which it waits.
        chosen: list[int] = torch.where(best.isfinite(), token_ids, NOT_FINITE).tolist()
        unsettled = [i for i, token in enumerate(chosen) if token < 0]
        if unsettled:
            _check_finite(best, chosen, rows)
            for i, token in zip(unsettled, self._draw_sorted(adjusted, best, rows, unsettled), strict=True):
                chosen[i] = token
        logprobs = _report(raw, chosen, rows)
        return [Sampled(token, logprobs.get(i)) for i, token in enumerate(chosen)]

    def _draw(self, logits: Tensor, best: Tensor, rows: Sequence[SamplingRow], drawn: list[int]) -> Tensor:
        """Token ids, int64 [len(drawn)], of the rows that are not greedy; UNSETTLED where a row has to be sorted."""
        scaled, keys = _scale(logits, best, rows, drawn)
        result = torch.empty(len(drawn), dtype=torch.int64, device=logits.device)
        for part in candidates(scaled, [Filter.of(rows[i].params) for i in drawn]):
            token_ids = _perturbed_best(part, keys[part.rows])
            result[part.rows] = token_ids if part.settled is None else torch.where(part.settled, token_ids, UNSETTLED)
        return result

    def _draw_sorted(self, logits: Tensor, best: Tensor, rows: Sequence[SamplingRow], drawn: list[int]) -> list[int]:
        """Token ids of rows whose filters need the whole order."""
        scaled, keys = _scale(logits, best, rows, drawn)
        part = sorted_candidates(scaled, [Filter.of(rows[i].params) for i in drawn])
        token_ids: list[int] = _perturbed_best(part, keys).tolist()
        return token_ids


def sampling_bytes(config: EngineConfig, vocab_size: int) -> int:
    """What sampling takes at its peak where every sequence of a step gets a token, the logits included."""
    return min(config.max_num_seqs, config.max_num_batched_tokens) * vocab_size * (4 + LOGIT_BYTES)


def _check_finite(best: Tensor, chosen: list[int], rows: Sequence[SamplingRow]) -> None:
    for i, token in enumerate(chosen):
        if token == NOT_FINITE:
            raise EngineDeadError(
                f"the model's logits for position {rows[i].position} are not finite (maximum {best[i].item()}); "
                "its weights or a kernel on this device give NaN or infinity"
            )


def _scale(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow], drawn: list[int]) -> tuple[Tensor, Tensor]:
    """Scores of the rows to draw, float32 [drawn, used vocab], the highest of each 0; and their keys, int64 [drawn]."""
    device = logits.device
    picked = [rows[i] for i in drawn]
    if len(drawn) < len(rows):
        logits, best = logits[drawn], best[drawn]
    temperature = torch.tensor([max(row.params.temperature, MIN_TEMPERATURE) for row in picked], device=device)
    # The best token is at 0, where float32 is finest.
    scaled = (logits - best.unsqueeze(-1)) / temperature.unsqueeze(-1)
    return scaled, row_keys([_seed(row) for row in picked], [row.position for row in picked], device)


def _perturbed_best(part: Candidates, keys: Tensor) -> Tensor:
    """The Gumbel-max of each row, int64 [part]. ``keys``: int64 [part]."""
    noise = gumbel(keys, part.token_ids)  # [part, candidates]
    winner = (part.scores + noise).argmax(dim=-1, keepdim=True)  # [part, 1]
    return part.token_ids.expand_as(noise).gather(-1, winner).squeeze(-1)


def _seed(row: SamplingRow) -> int:
    if row.params.seed is None:
        raise ValueError("a request that is not greedy has no seed; engine.requests.expand draws one")
    return row.params.seed


def _report(raw: Tensor, chosen: list[int], rows: Sequence[SamplingRow]) -> dict[int, TokenLogprobs]:
    """Log probabilities of the rows that ask for them. ``raw``: float32 [rows, used vocab]."""
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return {}
    part = raw if len(asked) == len(rows) else raw[asked]
    found = report(part, [chosen[i] for i in asked], [rows[i].params.logprobs or 0 for i in asked])
    return dict(zip(asked, found, strict=True))
