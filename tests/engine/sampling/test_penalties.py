"""Bias, penalties and masks, by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import EOS, USED, VOCAB, logits, row

from engine.execution.penalties import adjust
from engine.execution.sampler import Sampler


def reference_adjusted(values, one, eos):
    result = values.tolist()
    params = one.params
    for token, bias in params.logit_bias.items():
        if 0 <= token < len(result):
            result[token] += bias
    for token in set(one.prompt_token_ids) | set(one.output_token_ids):
        if token < len(result):
            penalty = params.repetition_penalty
            result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token in set(one.output_token_ids):
        if token < len(result):
            count = list(one.output_token_ids).count(token)
            result[token] -= params.frequency_penalty * count + params.presence_penalty
    if len(one.output_token_ids) < params.min_tokens:
        for token in [*params.stop_token_ids, *([] if params.ignore_eos else eos)]:
            if token < len(result):
                result[token] = -math.inf
    return result


TOKENS = st.lists(st.integers(0, USED + 3), max_size=12)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.builds(
            lambda prompt, output, options: row(prompt=prompt, output=output, **options),
            TOKENS,
            TOKENS,
            st.fixed_dictionaries(
                {
                    "repetition_penalty": st.sampled_from([1.0, 0.5, 1.7]),
                    "presence_penalty": st.sampled_from([0.0, -1.5, 2.0]),
                    "frequency_penalty": st.sampled_from([0.0, -0.3, 0.7]),
                    "logit_bias": st.dictionaries(st.integers(0, USED + 3), st.floats(-100, 100), max_size=4),
                    "min_tokens": st.integers(0, 6),
                    "stop_token_ids": st.lists(st.integers(0, USED + 3), max_size=3),
                    "ignore_eos": st.booleans(),
                }
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_bias_penalties_and_masks_are_those_of_the_definitions(rows):
    values = logits(len(rows), USED)
    expected = [reference_adjusted(values[i], one, [EOS]) for i, one in enumerate(rows)]
    torch.testing.assert_close(adjust(values, rows, [EOS]), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_repetition_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    values = logits(1, USED)
    prompt, output = [1, 5, 5, 9], [9, 20, 20]
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt + output]), values.clone())
    found = adjust(values, [row(prompt=prompt, output=output, repetition_penalty=1.4)], [])
    torch.testing.assert_close(found, expected)


def test_min_tokens_holds_off_every_stop_and_no_longer_than_it_should():
    values = torch.zeros(1, VOCAB)
    values[0, EOS], values[0, 9] = 50.0, 40.0
    sampler = Sampler(VOCAB, USED, [EOS])
    options = {"temperature": 0, "min_tokens": 2, "stop_token_ids": [9]}
    assert sampler(values, [row(output=[], **options)])[0].token_id == 0
    assert sampler(values, [row(output=[5], **options)])[0].token_id == 0
    assert sampler(values, [row(output=[5, 6], **options)])[0].token_id == EOS
    # An EOS that is ignored stops nothing, so nothing is to be held off.
    assert sampler(values, [row(output=[], ignore_eos=True, **options)])[0].token_id == EOS
