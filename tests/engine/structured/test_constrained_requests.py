"""Requests with a grammar in the engine: beside others, preempted, continued, ended."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_executor import EOS, USED_VOCAB_SIZE, ToyExecutor, make_core, make_request, run

from engine.core import EngineCore
from engine.errors import RequestError
from engine.loop import EngineLoop
from engine.messages import EngineRequest, FinishReason, StepOutput
from engine.sampling_params import StructuredOutputs
from engine.structured.compiler import GrammarCompiler

WAIT = 30.0
LETTERS = "abcdefghijklmnopqrstuvwxyz()"
TOKEN_BYTES = [b"", *(letter.encode() for letter in LETTERS)]
TOKEN_BYTES[EOS:EOS] = [b""]  # ids 0 and EOS have no text
LETTER = {data.decode(): token for token, data in enumerate(TOKEN_BYTES)}


class GatedCompiler(GrammarCompiler):
    """Compiles when the gate is open."""

    def __init__(self) -> None:
        super().__init__(TOKEN_BYTES, eos_token_ids=[EOS])
        self.gate = threading.Event()
        self.gate.set()
        self.compiled: list[str] = []

    def _compile(self, spec: StructuredOutputs) -> xgrammar.CompiledGrammar:
        assert self.gate.wait(timeout=WAIT)
        self.compiled.append(spec.source)
        return super()._compile(spec)


@pytest.fixture(scope="module")
def shared() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(TOKEN_BYTES, eos_token_ids=[EOS])
    yield compiler
    compiler.close()


@pytest.fixture
def grammars() -> Iterator[GatedCompiler]:
    compiler = GatedCompiler()
    yield compiler
    compiler.gate.set()
    compiler.close()


def constrained(name: str, form: dict[str, Any], max_tokens: int = 30, **options: object) -> EngineRequest:
    return make_request(name, [5, 9], max_tokens, structured_outputs=form, ignore_eos=False, **options)


def core(grammars: GrammarCompiler, *, num_kv_blocks: int = 64, **options: int | bool) -> EngineCore:
    return make_core(ToyExecutor(num_kv_blocks=num_kv_blocks, block_size=4), grammars, **options)


def text(tokens: list[int]) -> str:
    return b"".join(TOKEN_BYTES[token] for token in tokens).decode()


BRACKETS = {"grammar": 'root ::= "(" root ")" | "x" | "y" root'}


def is_sentence(sentence: str) -> bool:
    while sentence != "x":
        if sentence[:1] == "y":
            sentence = sentence[1:]
        elif sentence[:1] == "(" and sentence[-1:] == ")":
            sentence = sentence[1:-1]
        else:
            return False
    return True


def test_the_vocabulary_is_the_toys() -> None:
    assert len(TOKEN_BYTES) == USED_VOCAB_SIZE


def test_constrained_and_free_requests_share_steps_and_change_nothing_for_one_another(grammars: GatedCompiler) -> None:
    bound = [constrained(f"b{i}", BRACKETS, temperature=i % 2, seed=i, logprobs=1) for i in range(6)]
    free = [make_request(f"f{i}", [5 + i] * (i + 1), 20) for i in range(6)]
    mixed = [request for pair in zip(bound, free, strict=True) for request in pair]
    together = run(core(grammars, num_kv_blocks=14, max_num_seqs=6), mixed)
    assert together.preemptions > 0
    for request in mixed:
        alone = run(core(grammars), [request])
        assert together.token_ids[request.request_id] == alone.token_ids[request.request_id]
    for request in bound:
        last, tokens = together.last[request.request_id], together.token_ids[request.request_id]
        if last.finish_reason is FinishReason.STOP:
            assert (tokens[-1], last.stop_token_id) == (EOS, EOS)
            assert is_sentence(text(tokens))
        else:
            assert len(tokens) == 30
    assert grammars.compiled == [BRACKETS["grammar"]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), at=st.integers(0, 29), min_tokens=st.integers(0, 6), ignore_eos=st.booleans())
def test_a_constrained_request_goes_on_elsewhere(
    shared: GrammarCompiler, seed: int, at: int, min_tokens: int, ignore_eos: bool
) -> None:
    request = constrained("a", BRACKETS, temperature=1.0, seed=seed, min_tokens=min_tokens)
    request = replace(request, params=request.params.model_copy(update={"ignore_eos": ignore_eos}))
    tokens = run(core(shared), [request]).token_ids["a"]
    at = min(at, len(tokens) - 1)
    assert run(core(shared), [replace(request, output_token_ids=tokens[:at])]).token_ids["a"] == tokens[at:]


def test_min_tokens_and_ignore_eos_hold_off_an_end_that_may_wait(grammars: GatedCompiler) -> None:
    plus, two = {"regex": "a+"}, {"regex": "aa"}
    bias = {EOS: 100.0}
    found = run(
        core(grammars),
        [
            constrained("early", plus, logit_bias=bias),
            constrained("later", plus, logit_bias=bias, min_tokens=5),
            constrained("must", two, min_tokens=5),
            make_request("ignored", [5], 30, structured_outputs=two, ignore_eos=True),
            constrained("stopped", {"regex": "a+"}, stop_token_ids=[LETTER["a"]]),
            constrained("short", {"regex": "abcdef"}, max_tokens=4),
        ],
    )
    texts = {name: text(tokens) for name, tokens in found.token_ids.items()}
    assert texts == {"early": "a", "later": "aaaaa", "must": "aa", "ignored": "aa", "stopped": "a", "short": "abcd"}
    assert found.last["ignored"].finish_reason is FinishReason.STOP
    assert found.last["stopped"].stop_token_id == LETTER["a"]
    assert found.last["short"].finish_reason is FinishReason.LENGTH


def test_a_grammar_that_is_compiled_slowly_holds_up_nobody_else(grammars: GatedCompiler) -> None:
    grammars.gate.clear()
    engine = core(grammars)
    engine.add(constrained("slow", {"regex": "ab"}))
    assert not engine.has_work()
    assert (engine.load().waiting_requests, engine.load().free_blocks) == (1, 64)
    engine.add(make_request("a", [5], 3))
    for _ in range(3):
        assert [delta.request_id for delta in engine.step().deltas] == ["a"]
    assert engine.step().deltas == []
    grammars.gate.set()
    engine.wait()
    assert engine.has_work()
    tokens = [token for _ in range(3) for delta in engine.step().deltas for token in delta.token_ids]
    assert text(tokens) == "ab"
    assert not engine.has_work()


def test_what_is_aborted_while_it_compiles_is_forgotten(grammars: GatedCompiler) -> None:
    grammars.gate.clear()
    engine = core(grammars)
    for i in range(8):
        engine.add(constrained(f"r{i}", {"regex": "a" * (i + 1)}))
    engine.abort([f"r{i}" for i in range(8)])
    engine.check()
    assert engine.load().waiting_requests == 0
    engine.add(constrained("r0", {"regex": "b"}))
    grammars.gate.set()
    while not engine.has_work():
        engine.wait()
    while engine.load().waiting_requests:
        output = engine.step()
    assert text(output.deltas[0].token_ids) == "b"
    assert output.refused == {}
    assert len(grammars.compiled) <= 3  # at most what the threads had begun


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "(a"}, "can't be used"),
        ({"grammar": "root ::= root"}, "no sentence"),
        ({"regex": "é"}, "no sentence"),
    ],
)
def test_a_wrong_grammar_is_refused_and_the_others_go_on(
    grammars: GatedCompiler, form: dict[str, Any], message: str
) -> None:
    found = run(core(grammars), [make_request("a", [5], 4), constrained("b", form), make_request("c", [6], 4)])
    assert set(found.refused) == {"b"}
    assert message in str(found.refused["b"])
    assert found.refused["b"].field == "structured_outputs"
    assert {name: len(tokens) for name, tokens in found.token_ids.items()} == {"a": 4, "c": 4}


def test_output_that_does_not_follow_the_grammar_is_not_gone_on_with(grammars: GatedCompiler) -> None:
    form = {"regex": "ab"}
    a, b = LETTER["a"], LETTER["b"]
    wrong = replace(constrained("a", form), output_token_ids=[b])
    ended = replace(constrained("b", form), output_token_ids=[a, b, EOS])
    engine = core(grammars)
    with pytest.raises(RequestError, match="complete"):
        engine.add(ended)
    assert "does not go on" in str(run(engine, [wrong]).refused["a"])


def test_an_engine_without_grammars_says_so() -> None:
    engine = make_core(ToyExecutor(num_kv_blocks=16, block_size=4))
    with pytest.raises(RequestError) as refusal:
        engine.add(constrained("a", {"regex": "a"}))
    assert refusal.value.field == "structured_outputs"


def test_an_idle_loop_wakes_up_when_a_grammar_is_ready(grammars: GatedCompiler) -> None:
    outputs: queue.Queue[StepOutput] = queue.Queue()
    errors: queue.Queue[Exception] = queue.Queue()
    loop = EngineLoop(core(grammars), on_step=outputs.put, on_error=errors.put, heartbeat_seconds=WAIT)
    grammars.gate.clear()
    loop.start()
    loop.submit([constrained("a", {"regex": "ab"}), constrained("b", {"regex": "(a"})])
    outputs.get(timeout=WAIT)  # it looks once, and waits
    grammars.gate.set()
    tokens: list[int] = []
    refused: set[str] = set()
    while len(tokens) < 3 or not refused:
        output = outputs.get(timeout=WAIT / 2)
        tokens += [token for delta in output.deltas for token in delta.token_ids]
        refused |= set(output.refused)
    assert text(tokens) == "ab"
    assert refused == {"b"}
    loop.stop()
    assert errors.empty()
