"""The sampler as a whole: rows are alone, the odd cases, log probabilities, failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import EOS, USED, VOCAB, draw, logits, row
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import EngineDeadError
from engine.execution.sampler import Sampler, SamplingRow
from engine.sampling_params import SamplingParams

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-9, 0.7, 1.0, 100.0]),
        "top_k": st.sampled_from([-1, 0, 1, 5, 300]),
        "top_p": st.sampled_from([1.0, 0.9, 0.1, 0.999]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "frequency_penalty": st.sampled_from([0.0, -0.5]),
        "logit_bias": st.sampled_from([{}, {3: 5.0, 700: -100.0}]),
        "min_tokens": st.sampled_from([0, 3]),
        "stop_token_ids": st.sampled_from([[], [1, 5]]),
        "logprobs": st.sampled_from([None, 0, 4]),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)


@settings(deadline=None, max_examples=40)
@given(options=st.lists(OPTIONS, min_size=1, max_size=8), seed=st.integers(0, 2**31), scale=st.sampled_from([0.5, 4.0]))
def test_a_row_gets_the_same_token_whatever_rows_are_beside_it(options, seed, scale):
    vocab, used = 1000, 950
    rng = np.random.default_rng(seed)
    values = logits(len(options), vocab, seed, scale)
    rows = [
        row(
            int(rng.integers(0, 5000)),
            prompt=rng.integers(0, used, size=6).tolist(),
            output=rng.integers(0, used, size=rng.integers(0, 6)).tolist(),
            **option,
        )
        for option in options
    ]
    sampler = Sampler(vocab, used, [EOS])
    together = sampler(values, rows)
    order = rng.permutation(len(rows))
    shuffled = sampler(values[torch.from_numpy(order)], [rows[i] for i in order])
    for i, one in enumerate(rows):
        alone = sampler(values[i : i + 1], [one])[0]
        again = shuffled[int(np.flatnonzero(order == i)[0])]
        assert together[i].token_id == alone.token_id == again.token_id < used
        if alone.logprobs is not None:
            assert together[i].logprobs.top.keys() == alone.logprobs.top.keys()
            assert together[i].logprobs.rank == alone.logprobs.rank


def test_the_input_is_not_changed():
    values = logits(3)
    before = values.clone()
    Sampler(VOCAB, USED, [EOS])(
        values,
        [row(logit_bias={1: 5.0}), row(output=[3], presence_penalty=1.0), row(min_tokens=3, top_p=0.5, logprobs=2)],
    )
    assert torch.equal(values, before)


def test_greedy_takes_the_lowest_id_among_equals():
    values = torch.zeros(2, VOCAB)
    values[1, [7, 9, 20]] = 4.0
    assert [s.token_id for s in Sampler(VOCAB, USED, [])(values, [row(temperature=0), row(temperature=0)])] == [0, 7]


def test_equal_scores_are_drawn_equally():
    values = torch.full((1, VOCAB), -5.0)
    values[0, [7, 9, 20]] = 4.0
    tokens = draw(values, 9000, top_k=1)  # all equals are the most likely one
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts.sum() == counts[[7, 9, 20]].sum()
    assert (abs(counts[[7, 9, 20]] - 3000) < 5 * math.sqrt(9000 * 2 / 9)).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.01])
def test_a_tiny_temperature_is_greedy(temperature):
    values = logits(20)
    sampled = Sampler(VOCAB, USED, [])(values, [row(i, temperature=temperature) for i in range(20)])
    assert [s.token_id for s in sampled] == values[:, :USED].argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logit_bias_of_100_forces_and_of_minus_100_bans(temperature):
    values = logits(50)
    sampler = Sampler(VOCAB, USED, [])
    forced = sampler(values, [row(i, temperature=temperature, logit_bias={11: 100.0}) for i in range(50)])
    assert {s.token_id for s in forced} == {11}
    banned = {token: -100.0 for token in range(USED) if token not in (4, 5)}
    left = sampler(values, [row(i, temperature=temperature, logit_bias=banned) for i in range(50)])
    assert {s.token_id for s in left} == {4, 5}


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 100.0}, {"temperature": 100.0, "top_p": 0.99}])
def test_padding_ids_are_never_sampled_nor_reported(options):
    values = logits(200)
    values[:, USED:] = 1000.0
    bias = {USED: 100.0, VOCAB - 1: 100.0, VOCAB + 5: 100.0, -1: 100.0}
    sampled = Sampler(VOCAB, USED, [])(values, [row(i, logit_bias=bias, logprobs=20, **options) for i in range(200)])
    assert all(s.token_id < USED and max(s.logprobs.top) < USED for s in sampled)


class Transfers(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a tensor's values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settled", [True, False])
def test_one_transfer_tells_all_unless_a_row_has_to_be_sorted(settled, monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or original(tensor))
    options = [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.9 if settled else 0.9999}, {"min_p": 0.1}]
    with Transfers() as transfers:
        Sampler(2000, 1900, [EOS])(
            logits(5, 2000, scale=4.0 if settled else 0.1), [row(i, **o) for i, o in enumerate(options)]
        )
    assert len(reads) == (1 if settled else 2)
    assert transfers.count == 0


def test_a_grammars_mask_leaves_what_it_allows():
    values = logits(3)
    words = np.zeros(2, dtype=np.int32)
    words[:] = [(1 << 5) | -(1 << 31), 1 << 0]  # tokens 5, 31 and 32
    sampler = Sampler(VOCAB, USED, [EOS])
    for position in range(30):
        bound = SamplingRow(SamplingParams(seed=3), [], [], position, words)
        greedy = SamplingRow(SamplingParams(temperature=0, min_tokens=3), [], [], position, words)
        free = row(position, logprobs=1)
        together = sampler(values, [bound, free, greedy])
        assert together[0].token_id in (5, 31, 32)
        assert together[1] == sampler(values[1:2], [free])[0]
        assert together[2].token_id == max((5, 31, 32), key=lambda token: values[2, token])
        assert [one.token_id for one in sampler(values[[0, 2]], [bound, greedy])] == [
            together[0].token_id,
            together[2].token_id,
        ]


def test_logprobs_are_the_models_own_whatever_sampling_does():
    values = logits(3)
    expected = values[:, :USED].log_softmax(-1)
    rows = [
        row(temperature=0, logprobs=5),
        row(1, temperature=3.0, top_k=2, logit_bias={4: 100.0}, logprobs=0),
        row(2, output=[1], presence_penalty=2.0),
    ]
    sampled = Sampler(VOCAB, USED, [EOS])(values, rows)
    assert sampled[2].logprobs is None
    assert sampled[1].token_id == 4
    for i in (0, 1):
        found = sampled[i].logprobs
        assert found.token_id == sampled[i].token_id
        assert found.logprob == pytest.approx(expected[i, found.token_id].item(), abs=1e-6)
        assert found.rank == 1 + int((expected[i] > expected[i, found.token_id]).sum())
    best = expected[0].topk(5)
    assert list(sampled[0].logprobs.top) == best.indices.tolist()
    assert list(sampled[0].logprobs.top.values()) == pytest.approx(best.values.tolist(), abs=1e-6)
    assert sampled[0].logprobs.rank == 1
    assert sampled[1].logprobs.top == {}


def test_each_row_gets_as_many_logprobs_as_it_asks_for():
    counts = [0, 1, 20, 7]
    sampled = Sampler(VOCAB, USED, [])(logits(4), [row(logprobs=count) for count in counts])
    assert [len(s.logprobs.top) for s in sampled] == counts
    few = Sampler(5, 3, [])(logits(1, 5), [row(logprobs=20)])
    assert len(few[0].logprobs.top) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3}])
def test_logits_that_are_no_numbers_are_an_engine_error(bad, options):
    values = logits(3)
    values[1, 30] = bad
    with pytest.raises(EngineDeadError, match="position 77"):
        Sampler(VOCAB, USED, [])(values, [row(0), row(77, **options), row(2)])


def test_a_row_of_minus_infinity_is_an_engine_error():
    with pytest.raises(EngineDeadError, match="not finite"):
        Sampler(VOCAB, USED, [])(torch.full((1, VOCAB), -math.inf), [row()])


def test_nan_in_padding_is_nobodys_business():
    values = logits(1)
    values[0, USED:] = math.nan
    assert Sampler(VOCAB, USED, [])(values, [row(logprobs=2)])[0].token_id < USED


def test_wrong_shapes_and_missing_seeds_are_refused():
    sampler = Sampler(VOCAB, USED, [])
    with pytest.raises(ValueError, match="expected \\(1, 40\\)"):
        sampler(logits(2), [row()])
    with pytest.raises(ValueError, match="no seed"):
        sampler(logits(1), [row(seed=None)])
    with pytest.raises(ValueError, match="used_vocab_size"):
        Sampler(10, 11, [])
    assert sampler(torch.empty(0, VOCAB), []) == []
