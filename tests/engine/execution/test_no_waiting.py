"""A step on a GPU asks the device for nothing before its logits: on the meta device there would be no answer."""

from __future__ import annotations

import pytest
import torch
from on_meta import META, gpu_decoder, make_cache, step, to_meta

from benchmarks.scales import MODELS
from engine.models import DecoderModel
from engine.planning.layouts import find_layout

MODEL = MODELS["tiny"]


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> DecoderModel:
    return to_meta(gpu_decoder(MODEL, find_layout("tight", MODEL), monkeypatch))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("counts", [[1], [1] * 64, [1, 7, 1], [300]], ids=len)
def test_a_step_needs_no_value_from_the_device(
    decoder: DecoderModel, counts: list[int], cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = step(decoder, make_cache(MODEL, cache_dtype), counts, monkeypatch)
    assert logits.shape == (len(counts), MODEL.vocab_size)
    assert logits.device == META
