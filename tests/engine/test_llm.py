"""The offline interface on the real small model: what users see of the whole engine."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch

from engine import LLM, SamplingParams
from engine.errors import CheckpointError, ConfigError, EngineDeadError, RequestError
from engine.seeds import choice_seed

MODEL = Path(__file__).parents[2] / "examples" / "ernie-tiny" / "bf16"
OPTIONS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "num_kv_blocks": 256, "max_model_len": 256}
PROMPTS = [
    "def add(left, right):\n    return",
    "The",
    "class Tree:\n    def __init__(self, root):\n        self.root = root\n\n    def walk(self):\n",
    "import os\nimport sys\n",
    "1 2 3 4 5 6 7",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, max_num_seqs=8, max_num_batched_tokens=64, **OPTIONS) as model:
        yield model


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request):
    yield
    if "llm" in request.fixturenames:
        core = request.getfixturevalue("llm")._core
        core.check()
        load = core.load()
        assert not core.has_work()
        assert load.free_blocks == load.total_blocks


def texts(outputs):
    return [[(choice.text, choice.token_ids) for choice in output.outputs] for output in outputs]


def params(**options):
    options.setdefault("max_tokens", 16)
    options.setdefault("seed", 11)
    return SamplingParams(**options)


def test_a_prompt_gets_the_same_text_alone_and_in_a_batch(llm):
    mixed = [
        params(temperature=0),
        params(seed=1),
        params(seed=2, top_p=0.9, temperature=0.8),
        params(seed=3, top_k=20, repetition_penalty=1.2),
        params(seed=4, min_p=0.05, logit_bias={100: 3.0}),
    ]
    together = texts(llm.generate(PROMPTS, mixed))
    alone = [texts(llm.generate(prompt, option))[0] for prompt, option in zip(PROMPTS, mixed, strict=True)]
    assert together == alone
    assert texts(llm.generate(PROMPTS[::-1], mixed[::-1])) == alone[::-1]


def test_two_ranks_give_the_text_of_one(llm):
    mixed = [params(temperature=0), params(seed=5), params(seed=6, top_p=0.9)]
    with LLM(MODEL, tensor_parallel_size=2, max_num_seqs=8, **OPTIONS) as divided:
        assert texts(divided.generate(PROMPTS[:3], mixed)) == texts(llm.generate(PROMPTS[:3], mixed))
        assert texts(divided.generate(PROMPTS[0], mixed[1])) == texts(llm.generate(PROMPTS[0], mixed[1]))


def test_greedy_tokens_and_logprobs_are_those_of_transformers(llm):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    outputs = llm.generate(PROMPTS[:3], [params(temperature=0, logprobs=5), params(logprobs=3), params(logprobs=0)])
    for output, count in zip(outputs, (5, 3, 0), strict=True):
        choice = output.outputs[0]
        ids = output.prompt_token_ids + choice.token_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([ids])).logits[0, len(output.prompt_token_ids) - 1 : -1]  # [tokens, vocab]
        expected = logits[:, : llm.tokenizer.used_vocab_size].log_softmax(-1)
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        for i, entry in enumerate(choice.logprobs):
            assert entry.logprob == pytest.approx(expected[i, entry.token_id].item(), abs=1e-3)
            best = expected[i].topk(count).values.tolist()
            assert [top.logprob for top in entry.top] == pytest.approx(best, abs=1e-3)
            assert entry.token_bytes == llm.tokenizer.token_text(entry.token_id)[1]
        assert choice.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in choice.logprobs))
    greedy = outputs[0].outputs[0].logprobs
    assert all(entry.rank == 1 and entry.top[0].token_id == entry.token_id for entry in greedy)


def test_prompt_logprobs_are_those_of_transformers(llm):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompts = [PROMPTS[2] * 3, PROMPTS[0]]  # the first is longer than a step
    plain = llm.generate(prompts, params(temperature=0))
    for output, other in zip(llm.generate(prompts, params(temperature=0, prompt_logprobs=3)), plain, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([output.prompt_token_ids])).logits[0]  # [tokens, vocab]
        expected = logits[:, : llm.tokenizer.used_vocab_size].log_softmax(-1)
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        assert output.prompt_logprobs[0] is None
        for i, entry in enumerate(output.prompt_logprobs[1:], start=1):
            assert entry.token_id == output.prompt_token_ids[i]
            assert entry.logprob == pytest.approx(expected[i - 1, entry.token_id].item(), abs=1e-3)
            assert [top.logprob for top in entry.top] == pytest.approx(
                expected[i - 1].topk(3).values.tolist(), abs=1e-3
            )
        assert other.prompt_logprobs is None
        assert texts([output]) == texts([other])


def test_texts_have_the_form_that_is_asked_for(llm):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
            "kind": {"enum": ["a", "b", None]},
        },
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    forms = [{"json": schema}, {"regex": r"[A-Z][a-z]{2,9}\."}, {"choice": ["left", "right", "größer"]}]
    options = [params(structured_outputs=form, max_tokens=200, n=2, logprobs=1) for form in forms]
    outputs = llm.generate(PROMPTS[:3], options)
    assert texts(outputs) == [texts(llm.generate(PROMPTS[i], options[i]))[0] for i in range(3)]
    for choice in (choice for output in outputs for choice in output.outputs):
        assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
        assert len(choice.logprobs) == len(choice.token_ids)
    for choice in outputs[0].outputs:
        jsonschema.validate(json.loads(choice.text), schema)
    assert all(re.fullmatch(r"[A-Z][a-z]{2,9}\.", choice.text) for choice in outputs[1].outputs)
    assert all(choice.text in ("left", "right", "größer") for choice in outputs[2].outputs)
    with pytest.raises(RequestError, match="can't be used") as caught:
        llm.generate(PROMPTS[:2], [params(), params(structured_outputs={"regex": "(a"})])
    assert caught.value.field == "structured_outputs"


def test_the_text_is_the_tokens_decoded(llm):
    for output in llm.generate(PROMPTS, params(max_tokens=24, ignore_eos=True)):
        choice = output.outputs[0]
        assert choice.text == llm.tokenizer.decode(choice.token_ids, continuation=True)
        assert (choice.finish_reason, choice.stop_reason, len(choice.token_ids)) == ("length", None, 24)
        assert choice.logprobs is choice.cumulative_logprob is None
        assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt)


def test_each_choice_has_a_seed_of_its_own(llm):
    output = llm.generate(PROMPTS[0], params(n=4, seed=9))[0]
    assert [choice.index for choice in output.outputs] == [0, 1, 2, 3]
    for i, choice in enumerate(output.outputs):
        alone = llm.generate(PROMPTS[0], params(seed=choice_seed(9, i)))[0].outputs[0]
        assert (alone.text, alone.token_ids) == (choice.text, choice.token_ids)
    assert len({tuple(choice.token_ids) for choice in output.outputs}) > 1


def test_without_a_seed_texts_differ(llm):
    outputs = llm.generate([PROMPTS[1]] * 4, SamplingParams(max_tokens=12, temperature=2.0))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 1


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text_and_end_the_request(llm, include):
    free = llm.generate(PROMPTS[2], params(max_tokens=40, ignore_eos=True))[0].outputs[0]
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 4]
    assert stop
    cut = llm.generate(
        PROMPTS[2], params(max_tokens=40, ignore_eos=True, stop=[stop, "\x00"], include_stop_str_in_output=include)
    )[0].outputs[0]
    at = free.text.find(stop)
    assert cut.text == free.text[: at + len(stop) * include]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert stop in llm.tokenizer.decode(cut.token_ids, continuation=True)
    assert len(cut.token_ids) < 40


def test_stop_tokens_and_min_tokens(llm):
    free = llm.generate(PROMPTS[3], params(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0]
    stop = free.token_ids[0]
    short = llm.generate(PROMPTS[3], params(temperature=0, max_tokens=12, stop_token_ids=[stop]))[0].outputs[0]
    assert (short.token_ids, short.text, short.finish_reason, short.stop_reason) == ([stop], "", "stop", stop)
    longer = llm.generate(PROMPTS[3], params(temperature=0, min_tokens=6, stop_token_ids=[stop]))[0].outputs[0]
    assert len(longer.token_ids) > 6 or longer.finish_reason == "length"
    assert not {stop, *llm.tokenizer.eos_token_ids} & set(longer.token_ids[:6])


def test_eos_ends_the_text_and_is_no_part_of_it(llm):
    eos = llm.tokenizer.eos_token_ids[-1]
    first = llm.generate(PROMPTS[0], params(logit_bias={eos: 100.0}))[0].outputs[0]
    assert (first.token_ids, first.text, first.finish_reason, first.stop_reason) == ([eos], "", "stop", None)
    third = llm.generate(PROMPTS[0], params(logit_bias={eos: 100.0}, min_tokens=2))[0].outputs[0]
    assert len(third.token_ids) == 3
    assert third.token_ids[-1] == eos
    assert third.text == llm.tokenizer.decode(third.token_ids[:2], continuation=True)


def test_padding_ids_never_come_up(llm):
    outputs = llm.generate(PROMPTS, params(temperature=100.0, max_tokens=20, n=2, ignore_eos=True, logprobs=20))
    used = llm.tokenizer.used_vocab_size
    assert used < llm.model_config.vocab_size
    for output in outputs:
        for choice in output.outputs:
            assert max(choice.token_ids) < used
            assert all(top.token_id < used for entry in choice.logprobs for top in entry.top)
    with pytest.raises(RequestError, match=f"token id {used}") as caught:
        llm.generate("a", params(logit_bias={used: 100.0}))
    assert caught.value.field == "logit_bias"


def test_chat_is_generate_on_the_template(llm):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello! <|end_of_sentence|>"}]
    output = llm.chat(messages, params())[0]
    assert output.prompt_token_ids == llm.tokenizer.encode_chat(messages)
    assert output.prompt_token_ids.count(llm.tokenizer.token_id("<|end_of_sentence|>")) == 0
    assert texts([output]) == texts(llm.generate(output.prompt_token_ids, params()))
    several = llm.chat([messages, messages[1:]], params())
    assert texts(several[:1]) == texts([output])
    assert several[1].prompt_token_ids == llm.tokenizer.encode_chat(messages[1:])


def test_prompts_may_be_text_or_tokens_one_or_several(llm):
    ids = llm.tokenizer.encode(PROMPTS[0])
    expected = texts(llm.generate(PROMPTS[0], params()))
    assert texts(llm.generate(ids, params())) == expected
    assert texts(llm.generate([ids, PROMPTS[0]], params())) == expected * 2
    assert texts(llm.generate([PROMPTS[0], ids], [params(), params()])) == expected * 2
    assert llm.generate([], params()) == []
    assert llm.chat([], params()) == []


def test_the_prefix_cache_changes_no_text(llm):
    prompt = PROMPTS[2] * 3
    first = llm.generate(prompt, params(seed=77))[0]
    again = llm.generate(prompt, params(seed=77))[0]
    assert again.num_cached_tokens > 0
    assert texts([first]) == texts([again])


def test_more_requests_than_fit_at_once_are_all_served(llm):
    outputs = llm.generate([PROMPTS[i % 5] for i in range(20)], [params(seed=i, max_tokens=6) for i in range(20)])
    assert all(1 <= len(output.outputs[0].token_ids) <= 6 for output in outputs)
    for i in (0, 7, 19):
        assert texts(llm.generate(PROMPTS[i % 5], params(seed=i, max_tokens=6))) == texts([outputs[i]])


@pytest.mark.parametrize(
    ("prompt", "field", "code"),
    [
        ("word " * 400, "prompt", "context_length_exceeded"),
        ([], None, None),
        ("", "prompt", None),
        ([5, 8191], "prompt", None),
        ([[]], "prompt", None),
        ([None], "prompt", None),
        ("half \ud83c", "prompt", None),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_before_anything_runs(llm, prompt, field, code):
    if field is None:
        assert llm.generate(prompt) == []
        return
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt, params())
    assert (caught.value.field, caught.value.code) == (field, code)
    steps = llm._core.load().steps
    if isinstance(prompt, str):
        with pytest.raises(RequestError):
            llm.generate([PROMPTS[0], prompt], params())
        assert llm._core.load().steps == steps


def test_the_number_of_parameters_must_be_that_of_prompts(llm):
    with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts"):
        llm.generate(PROMPTS[:3], [params()] * 2)


def test_options_are_checked_by_name():
    with pytest.raises(ConfigError, match="max_num_seq:"):
        LLM(MODEL, max_num_seq=3)
    with pytest.raises(CheckpointError, match=r"there is no folder '.*nothing'"):
        LLM(MODEL / "nothing")


def test_after_shutdown_nothing_runs():
    model = LLM(MODEL, **OPTIONS)
    model.shutdown()
    model.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        model.generate("a", params())


def test_an_interrupted_run_leaves_the_engine_usable(llm, monkeypatch):
    expected = texts(llm.generate(PROMPTS[0], params()))
    with monkeypatch.context() as patched:
        patched.setattr(llm._core, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, params())
    assert texts(llm.generate(PROMPTS[0], params())) == expected
