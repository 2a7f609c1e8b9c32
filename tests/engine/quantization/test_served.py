"""What a reader may choose: integers made while loading, and how many planes to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import LLM, SamplingParams
from engine.compress import rtn
from engine.errors import ConfigError, UnsupportedError
from engine.quantization.bitplane import Bitplane
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import Span
from engine.quantization.rounded import Rounded
from engine.quantization.served import as_served
from engine.quantization.wint8 import Wint8
from kernels.reference.dequantize import dequantize

TINY = Path(__file__).resolve().parents[3] / "examples" / "ernie-tiny"


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([4, 8]), cut=st.integers(1, 63), column=st.integers(1, 11), seed=st.integers(0, 99))
def test_a_cut_is_the_cut_of_the_whole(bits: int, cut: int, column: int, seed: int) -> None:
    weight = torch.randn(128, 12, generator=torch.Generator().manual_seed(seed)).bfloat16()
    rounded = Rounded(bits)
    whole = dequantize(rounded.load({"weight": weight}, rows=Span(0, 128), columns=[Span(0, 12)]), torch.float32)
    part = rounded.load({"weight": weight}, rows=Span(2 * cut, 128), columns=[Span(column, 12), Span(0, column)])
    expected = torch.cat((whole[column:], whole[:column]))[:, 2 * cut :]
    assert torch.equal(dequantize(part, torch.float32), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_what_rounding_ahead_of_time_gives(bits: int) -> None:
    weight = torch.randn(128, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    loaded = Rounded(bits).load({"weight": weight}, rows=Span(0, 128), columns=[Span(0, 12)])
    packed = rtn.quantize(weight.T, bits=bits)  # type: ignore[arg-type]  # the parameters are these literals
    assert torch.equal(dequantize(loaded, torch.bfloat16), packed.dequantize())


def test_a_quantized_checkpoint_is_not_rounded_again() -> None:
    stored = QuantizationConfig.of(dense=Wint8(), experts=Wint8())
    with pytest.raises(ConfigError, match=r"quantized already \(wint8\)"):
        as_served(stored, on_load="wint4", planes=None)


def test_planes_are_chosen_by_the_reader() -> None:
    stored = QuantizationConfig.of(dense=Wint8(), experts=Bitplane(planes=4, nested=True))
    served = as_served(stored, on_load=None, planes=3)
    assert served.format("experts", 5) == Bitplane(planes=4, nested=True, read_planes=3)
    assert served.format("attention", 5) == Wint8()
    with pytest.raises(ConfigError, match="no bit planes"):
        as_served(QuantizationConfig(), on_load=None, planes=3)
    with pytest.raises(UnsupportedError, match="2 planes can't be read"):
        as_served(QuantizationConfig.of(dense=Wint8(), experts=Bitplane(planes=4)), on_load=None, planes=2)


@pytest.mark.parametrize("quantization", ["wint8", "wint4"])
def test_a_model_is_served_in_integers(quantization: str) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=8, logprobs=1)
    with LLM(TINY / "bf16", num_threads=1, max_model_len=64) as exact:
        expected = exact.generate(["import os"], greedy)[0].outputs[0]
    with LLM(TINY / "bf16", num_threads=1, max_model_len=64, quantization=quantization) as rounded:
        found = rounded.generate(["import os"], greedy)[0].outputs[0]
    assert found.logprobs is not None
    assert expected.logprobs is not None
    difference = abs(found.logprobs[0].logprob - expected.logprobs[0].logprob)
    assert 0 < difference < 0.5, "other weights, and yet the same model"
