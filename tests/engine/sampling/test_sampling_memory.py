"""Sampling takes no more memory than is set aside for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes

from engine.execution.sampler import LOGIT_BYTES, Sampler, SamplingRow
from engine.sampling_params import SamplingParams

ROWS, VOCAB = 16, 32768
PENALTIES: dict[str, Any] = {
    "presence_penalty": 1.0,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {5: 1.0},
    "min_tokens": 8,
    "logprobs": 20,
}
DEAREST: dict[str, Any] = {"top_p": 0.999, "top_k": 20000, "min_p": 1e-6, **PENALTIES}


def peak(params: dict[str, Any], *, masked: bool = False) -> float:
    """Bytes for each logit, beside the logits themselves."""
    row = SamplingRow(
        SamplingParams(seed=3, **params),
        prompt_token_ids=[1, 2, 3],
        output_token_ids=[4, 5],
        position=5,
        allowed=np.full(VOCAB // 32, -1, dtype=np.int32) if masked else None,
    )
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    with LiveBytes() as live:
        Sampler(VOCAB, VOCAB, [2])(logits, [row] * ROWS)
    return live.peak / logits.numel()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0, **PENALTIES},
        {},
        {"min_p": 0.1},
        {"top_k": 50},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 0.999, **PENALTIES},
        DEAREST,
    ],
    ids=lambda params: "-".join(params) or "plain",
)
@pytest.mark.parametrize("masked", [False, True])
def test_no_parameters_take_more(params: dict[str, Any], masked: bool) -> None:
    assert peak(params, masked=masked) <= LOGIT_BYTES * 1.01  # some bytes a row come on top


def test_the_dearest_takes_nearly_that() -> None:
    assert peak(DEAREST, masked=True) > 0.85 * LOGIT_BYTES
