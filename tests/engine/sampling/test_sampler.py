"""The sampler against simple references, one row and one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import EngineDeadError
from engine.execution.filters import HEAD, Filter, candidates, sorted_candidates
from engine.execution.penalties import adjust
from engine.execution.sampler import Sampler, SamplingRow
from engine.sampling_params import SamplingParams

VOCAB, USED, EOS = 40, 33, 2


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(position=0, prompt=(), output=(), **options):
    options.setdefault("seed", 0)
    return SamplingRow(SamplingParams(**options), list(prompt), list(output), position)


def logits(rows, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# --- what may be drawn -------------------------------------------------------------------------------------------


def reference_kept(scores, *, top_k, top_p, min_p):
    """Kept tokens of one row, by the definitions, with plain Python."""
    kept = {i for i, score in enumerate(scores) if score > -math.inf}
    if top_k > 0:
        kth = sorted(scores, reverse=True)[:top_k][-1]
        kept = {i for i in kept if scores[i] >= kth}
    if top_p < 1:
        total = math.fsum(math.exp(scores[i]) for i in kept)
        mass, last = 0.0, None
        for score in sorted((scores[i] for i in kept), reverse=True):
            if last is not None and mass >= top_p:
                break
            mass += math.exp(score) / total
            last = score
        kept = {i for i in kept if scores[i] >= last}
    best = max(scores)
    return {i for i in kept if not min_p or scores[i] - best >= math.log(min_p)}


def kept_sets(scores, filters):
    found = {}
    for part in candidates(scores, filters):
        ids = part.token_ids.expand(part.scores.shape)
        for j, i in enumerate(part.rows.tolist()):
            assert i not in found
            if part.settled is None or part.settled[j]:
                found[i] = set(ids[j][part.scores[j] > -math.inf].tolist())
            else:
                whole = sorted_candidates(scores[i : i + 1], [filters[i]])
                found[i] = set(whole.token_ids[whole.scores[0] > -math.inf].tolist())
    return found


@settings(deadline=None, max_examples=100)
@example(vocab=HEAD + 1, scale=0.01, steps=None, seed=0, options=[(HEAD + 1, 0.3, 0.0)])  # top_k beyond the head
@example(vocab=900, scale=0.0, steps=None, seed=0, options=[(50, 0.3, 0.0)])  # equals of the k-th beyond the head
@example(vocab=900, scale=0.1, steps=None, seed=0, options=[(HEAD + 1, 0.1, 0.7), (HEAD, 0.9, 0.7), (300, 1.0, 0.9)])
@given(
    vocab=st.sampled_from([1, 7, HEAD - 1, HEAD, HEAD + 1, 900]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 6.0]),
    steps=st.sampled_from([None, 4]),
    seed=st.integers(0, 2**31),
    options=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 50, HEAD - 1, HEAD, HEAD + 1, 10_000]),
            st.sampled_from([1.0, 1e-6, 0.3, 0.9, 0.999]),
            st.sampled_from([0.0, 1e-3, 0.2, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_kept_sets_are_exact(vocab, scale, steps, seed, options):
    scores = logits(len(options), vocab, seed, scale)
    if steps:  # many equal scores
        scores = (scores * steps).round() / steps
    scores = scores - scores.max(dim=-1, keepdim=True).values
    filters = [Filter(*option) for option in options]
    found = kept_sets(scores, filters)
    assert set(found) == set(range(len(options)))
    for i, kept in enumerate(filters):
        values = scores[i].tolist()
        expected = reference_kept(values, top_k=kept.top_k, top_p=kept.top_p, min_p=kept.min_p)
        difference = found[i] ^ expected
        # Where a sum of probabilities hits top_p to the last bits, one score more or less is right.
        assert not difference or (kept.top_p < 1 and borderline(values, kept, difference))


def borderline(scores, kept, difference):
    lower = reference_kept(scores, top_k=kept.top_k, top_p=max(kept.top_p - 2e-6, 1e-9), min_p=kept.min_p)
    upper = reference_kept(scores, top_k=kept.top_k, top_p=min(kept.top_p + 2e-6, 0.9999999), min_p=kept.min_p)
    return difference <= upper - lower


def test_top_p_keeps_the_token_that_reaches_it_and_no_more():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    scores = scores - scores[:, :1]
    for top_p, count in ((0.4, 1), (0.499, 1), (0.501, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        assert kept_sets(scores, [Filter(0, top_p, 0.0)]) == {0: set(range(count))}


def test_top_p_counts_what_top_k_left():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    scores = scores - scores[:, :1]
    # Of the first two, the first has 4/7 = 0.571.
    assert kept_sets(scores, [Filter(2, 0.57, 0.0), Filter(2, 0.58, 0.0)][:1]) == {0: {0}}
    assert kept_sets(scores, [Filter(2, 0.58, 0.0)]) == {0: {0, 1}}


# --- frequencies ---------------------------------------------------------------------------------------------------


def draw(values, count, **options):
    """Tokens drawn at ``count`` positions from one row of logits."""
    sampler = Sampler(values.shape[-1], values.shape[-1], [])
    params = SamplingParams(**{"seed": 0, **options})
    rows = [SamplingRow(params, [], [], position) for position in range(count)]
    return np.array([sampled.token_id for sampled in sampler(values.expand(count, -1), rows)])


def chi_square(tokens, probabilities):
    """Pearson's statistic over tokens expected at least five times, and its degrees of freedom."""
    expected = np.asarray(probabilities) * len(tokens)
    observed = np.bincount(tokens, minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    big = expected >= 5
    statistic = ((observed[big] - expected[big]) ** 2 / expected[big]).sum()
    rest = expected[~big].sum()
    if rest > 1:
        statistic += (observed[~big].sum() - rest) ** 2 / rest
    return statistic, big.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 10},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    ],
)
@pytest.mark.parametrize("seed", [0, 123456789])
def test_frequencies_are_those_of_the_softmax(options, seed):
    values = logits(1, 64, seed=5, scale=1.5)
    tokens = draw(values, 10_000, seed=seed, **options)
    scores = ((values[0] - values.max()) / options.get("temperature", 1.0)).double()
    kept = reference_kept(
        scores.tolist(), top_k=options.get("top_k", 0), top_p=options.get("top_p", 1.0), min_p=options.get("min_p", 0.0)
    )
    mask = torch.tensor([i in kept for i in range(64)])
    statistic, freedom = chi_square(tokens, scores.masked_fill(~mask, -math.inf).softmax(-1).numpy())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4  # beyond the 99.99 % point


def test_rare_tokens_are_drawn_as_often_as_they_should():
    # 4,000 tokens of probability 2.5e-5 together make 10 %.
    values = torch.cat([torch.tensor([math.log(0.9)]), torch.full((4000,), math.log(0.1 / 4000))]).unsqueeze(0)
    tokens = np.concatenate([draw(values, 2000, seed=seed) for seed in range(5)])
    rare = (tokens > 0).sum()
    assert abs(rare - 1000) < 5 * math.sqrt(10_000 * 0.1 * 0.9)
    assert len(np.unique(tokens[tokens > 0])) > 800  # spread over the tokens


def test_positions_are_independent():
    values = torch.zeros(1, 8)
    tokens = draw(values, 20_000, seed=3)
    for lag in (1, 2, 5):
        pairs = tokens[lag:] * 8 + tokens[:-lag]
        statistic, freedom = chi_square(pairs, np.full(64, 1 / 64))
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_seeds_are_independent():
    sampler = Sampler(8, 8, [])
    count = 6_000
    values = torch.zeros(count, 8)
    drawn = {
        step: np.array([s.token_id for s in sampler(values, [row(9, seed=i * step) for i in range(count)])])
        for step in (1, -1, 2**32)
    }
    for tokens in drawn.values():
        statistic, freedom = chi_square(tokens, np.full(8, 1 / 8))
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)
        statistic, freedom = chi_square(tokens[1:] * 8 + tokens[:-1], np.full(64, 1 / 64))
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)


# --- a row is alone ------------------------------------------------------------------------------------------------

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


# --- greedy, bias, penalties, min_tokens ---------------------------------------------------------------------------


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


# --- log probabilities ---------------------------------------------------------------------------------------------


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


# --- failures ------------------------------------------------------------------------------------------------------


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
